"""Groups of blocks that move together: one block, or the experts that share packed parameters."""

from collections.abc import Iterable
from dataclasses import dataclass

from ...blocks import Block, BlockKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Blocks that move together. ``modules`` compute with the weights; ``parameters`` are whole."""

    name: str
    blocks: tuple[Block, ...]
    parameters: tuple[str, ...]
    modules: tuple[str, ...]

    @property
    def kind(self) -> BlockKind:
        """The kind of its blocks, which is one."""
        return self.blocks[0].kind

    @property
    def layer(self) -> int | None:
        """The layer of its blocks, which is one."""
        return self.blocks[0].layer


def group_blocks(blocks: Iterable[Block]) -> tuple[Group, ...]:
    """Put the experts of one packed module together; every other block is a group by itself."""
    members: dict[str, list[Block]] = {}
    for block in blocks:
        packed = any(piece.expert is not None for piece in block.pieces)
        members.setdefault(block.name.rsplit(".", 1)[0] if packed else block.name, []).append(block)
    return tuple(
        Group(
            name=name,
            blocks=tuple(group),
            parameters=tuple(
                dict.fromkeys(piece.parameter for block in group for piece in block.pieces)
            ),
            modules=tuple(dict.fromkeys(module for block in group for module in block.modules)),
        )
        for name, group in members.items()
    )
