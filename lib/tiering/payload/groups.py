"""Groups of blocks that move together: one block, or the experts that share packed parameters where
these can't be taken one by one.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from ...blocks import Block, BlockKind, takes_single_experts


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Blocks that move together. ``modules`` compute with the weights; ``parameters`` are whole,
    but for an expert's own slice of them (``expert``: its number).
    """

    name: str
    blocks: tuple[Block, ...]
    parameters: tuple[str, ...]
    modules: tuple[str, ...]
    expert: int | None = None

    @property
    def kind(self) -> BlockKind:
        """The kind of its blocks, which is one."""
        return self.blocks[0].kind

    @property
    def layer(self) -> int | None:
        """The layer of its blocks, which is one."""
        return self.blocks[0].layer


def group_blocks(model: nn.Module, blocks: Iterable[Block]) -> tuple[Group, ...]:
    """Make every block a group by itself, but for the experts of a packed module that takes its
    weights as a whole.

    Raises InputError for experts that are spread over several processes.
    """
    members: dict[str, list[Block]] = {}
    for block in blocks:
        packed = any(piece.expert is not None for piece in block.pieces)
        whole = packed and not takes_single_experts(model.get_submodule(block.modules[0]))
        members.setdefault(block.name.rsplit(".", 1)[0] if whole else block.name, []).append(block)
    return tuple(
        Group(
            name=name,
            blocks=tuple(group),
            parameters=tuple(
                dict.fromkeys(piece.parameter for block in group for piece in block.pieces)
            ),
            modules=tuple(dict.fromkeys(module for block in group for module in block.modules)),
            expert=group[0].pieces[0].expert if name == group[0].name else None,
        )
        for name, group in members.items()
    )
