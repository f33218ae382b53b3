"""Experts that can be taken one by one: packed ones as transformers has them, and lists of modules;
how many of them a token takes.
"""

from typing import Any

from torch import nn

from ..errors import InputError


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
        and "forward" not in vars(module)
        and hasattr(module, "has_gate")
        and getattr(config, "_experts_implementation", None) in _IMPLEMENTATIONS
        and all(parameter.is_contiguous() for parameter in module.parameters())
        and len({parameter.shape[0] for parameter in module.parameters()}) == 1
    )


def is_listed_expert(model: nn.Module, name: str) -> bool:
    """Say whether a module is one of a list of experts, which its layer calls for the tokens that
    are routed to it.
    """
    owner, _, _ = name.rpartition(".")
    module = model.get_submodule(name)
    return (
        owner.endswith("experts")
        and isinstance(model.get_submodule(owner), nn.ModuleList)
        and type(module).forward is not nn.Module.forward
        and all(getattr(each, "max_norm", None) is None for each in module.modules())
    )


def routed_experts(model: nn.Module, experts: str, num_experts: int) -> int:
    """Return how many experts a token takes of a packed module or a list of that name, by the names
    that its layer and configurations have for it; 2 where they don't say.
    """
    layer = model.get_submodule(experts.rpartition(".")[0])
    found = (
        getattr(each, name, None)
        for place in (model.get_submodule(experts), layer)
        for each in (getattr(place, "config", None), place)
        for name in _ROUTED
    )
    return min(next((count for count in found if type(count) is int and count > 0), 2), num_experts)


_ROUTED = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "top_k")
EXPERTS_IMPLEMENTATION = "tierhints"
"""Our name among transformers' implementations of experts."""
_IMPLEMENTATIONS = {"eager", "grouped_mm", "batched_mm", EXPERTS_IMPLEMENTATION}
"""Those of transformers that compute with the parameters as they are, and ours."""
