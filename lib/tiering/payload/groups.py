"""Groups of blocks that move together: one block, or the experts that share packed parameters where
these can't be taken one by one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from ...blocks import (
    Block,
    BlockKind,
    is_listed_expert,
    routed_experts,
    takes_single_experts,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Blocks that move together. ``modules`` compute with the weights; ``parameters`` are whole,
    but for a packed expert's own slice of them. ``expert``: the number among those of its layer, of
    one that comes when tokens are routed to it.
    """

    name: str
    blocks: tuple[Block, ...]
    parameters: tuple[str, ...]
    modules: tuple[str, ...]
    expert: int | None = None

    @property
    def slice(self) -> int | None:
        """What it has of its parameters along dimension 0; None: all."""
        return None if self.blocks[0].pieces[0].expert is None else self.expert

    @property
    def experts(self) -> str:
        """The packed module, or the list, that an expert is one of."""
        module = self.modules[0]
        return module.rpartition(".")[0] if self.slice is None else module

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
    blocks = tuple(blocks)
    listed = _number_listed(model, blocks)
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
            expert=listed.get(name, group[0].pieces[0].expert if name == group[0].name else None),
        )
        for name, group in members.items()
    )


def _number_listed(model: nn.Module, blocks: Sequence[Block]) -> dict[str, int]:
    """Return the numbers of experts that are modules of a list, by block: of lists of which a token
    takes some, and whose experts have all that they compute with to themselves.
    """
    lists: dict[str, list[Block]] = {}
    packed: set[str] = set()
    for block in blocks:
        if block.pieces[0].expert is not None:
            packed.add(block.modules[0])
        elif block.kind is BlockKind.EXPERT:
            lists.setdefault(block.modules[0].rpartition(".")[0], []).append(block)
    numbers: dict[str, int] = {}
    for name, experts in lists.items():
        if (
            all(is_listed_expert(model, block.modules[0]) for block in experts)
            and all(len(block.modules) == 1 and not block.tied for block in experts)
            and not any(inner.startswith(f"{name}.") for inner in (*lists, *packed))
            and routed_experts(model, name, len(experts)) < len(experts)
        ):
            numbers |= {block.name: number for number, block in enumerate(experts)}
    return numbers
