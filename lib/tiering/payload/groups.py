"""Groups of blocks that move together: one block, or the experts that share packed parameters where
these can't be taken one by one.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...blocks import Block, BlockKind
from ...errors import InputError


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


def takes_single_experts(module: nn.Module) -> bool:
    """Say whether packed experts compute by an implementation that transformers lets others
    provide: it gets the routed ids before any weight is touched.

    Raises InputError for experts that are spread over several processes.
    """
    if getattr(module, "_is_expert_parallel", False):
        raise InputError(
            f"{type(module).__name__} has its experts spread over several processes (expert "
            "parallelism): load the model without it"
        )
    config: Any = getattr(module, "config", None)
    return (
        hasattr(type(module).forward, "__wrapped__")
        and hasattr(module, "has_gate")
        and getattr(config, "_experts_implementation", None) in _IMPLEMENTATIONS
        and all(parameter.is_contiguous() for parameter in module.parameters())
        and len({parameter.shape[0] for parameter in module.parameters()}) == 1
    )


def routed_experts(experts: nn.Module, num_experts: int) -> int:
    """Return how many experts a token takes, by the names that configurations have for it; 2 where
    they don't say.
    """
    config = getattr(experts, "config", None)
    found = (getattr(config, name, None) for name in _ROUTED)
    return min(next((count for count in found if type(count) is int and count > 0), 2), num_experts)


_ROUTED = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "top_k")
IMPLEMENTATION = "tierhints"
"""Our name among transformers' implementations of experts."""
_IMPLEMENTATIONS = {"eager", "grouped_mm", "batched_mm", IMPLEMENTATION}
"""Those of transformers that compute with the parameters as they are, and ours."""
