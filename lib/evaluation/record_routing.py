"""What a mixture's routers choose while it answers: recorded where it enters the experts.

Every mixture of transformers 5 hands its packed experts the chosen ids and their weights; a hook
before that call writes them down, whatever the router is.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..policy.experts.routing import Cell, Trace
from .route_traces import make_trace


def record_routing(
    model: Any, prompts: Tensor, *, new_tokens: int, seed: int = 0, name: str = ""
) -> Trace:
    """Answer each prompt by itself, sampled at temperature 1, and return what was routed.

    ``prompts``: token ids (N, T) without padding; each is a turn, of T prompt tokens and
    ``new_tokens`` decode steps. Raises InputError for a model without experts that could be seen.
    """
    layers = expert_modules(model)
    recorder = _Recorder()
    handles = [
        module.register_forward_pre_hook(recorder.hook(layer), with_kwargs=True)
        for layer, module in layers.items()
    ]
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            for turn, ids_T in enumerate(prompts):
                recorder.begin(turn)
                lasting = {"min_new_tokens": new_tokens + 1, "max_new_tokens": new_tokens + 1}
                model.generate(
                    ids_T[None].to(model.device), do_sample=True, temperature=1.0, top_k=0,
                    top_p=1.0, use_cache=True, **lasting,
                )  # fmt: skip
    finally:
        for handle in handles:
            handle.remove()
    return make_trace(
        recorder.cells,
        model=name,
        experts={layer: _count(module) for layer, module in layers.items()},
        expert_bytes={layer: _expert_bytes(module) for layer, module in layers.items()},
    )


def expert_modules(model: nn.Module) -> Mapping[int, nn.Module]:
    """Return by layer the modules with packed experts; raises InputError where there are none."""
    found: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] == "experts" and _count(module):
            numbers = re.findall(r"\.(\d+)\.", f".{name}.")
            layer = int(numbers[0]) if numbers else len(found)
            if layer in found:
                raise InputError(f"layer {layer} has experts twice ({name}): give another model")
            found[layer] = module
    if not found:
        raise InputError(
            f"{type(model).__name__} has no module experts with packed parameters: "
            "give a mixture of experts"
        )
    return found


class _Recorder:
    """The cells so far, and how far each layer is in the turn."""

    def __init__(self) -> None:
        self.cells: list[Cell] = []
        self._turn = 0
        self._steps: dict[int, int] = {}

    def begin(self, turn: int) -> None:
        """Start a prompt."""
        self._turn = turn
        self._steps = {}

    def hook(self, layer: int) -> Any:
        """Return the hook of a layer's experts."""

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = (*args, *kwargs.values())
            if len(given) < 3 or given[1].dim() != 2 or given[1].is_floating_point():
                raise InputError(
                    f"{type(module).__name__} is not given the ids of its experts: "
                    "give a mixture whose experts take (hidden_states, top_k_index, top_k_weights)"
                )
            self._add(layer, given[1], given[2])

        return note

    def _add(self, layer: int, index_TK: Tensor, weights: Tensor) -> None:
        first = self._steps.get(layer, 0)
        if weights.shape != index_TK.shape:  # of all experts
            weights = weights.gather(1, index_TK)
        ids, shares = index_TK.tolist(), weights.float().tolist()
        if first and len(ids) != 1:
            raise InputError(f"{len(ids)} tokens at once while decoding: the model keeps no cache")
        for place, (experts, share) in enumerate(zip(ids, shares, strict=True)):
            cell = Cell(self._turn, first > 0, first + place, layer, tuple(experts), tuple(share))
            self.cells.append(cell)
        self._steps[layer] = first + len(ids)


def _count(module: nn.Module) -> int:
    """Return the experts of packed parameters, 0 where a module has none."""
    leading = {
        parameter.shape[0] for parameter in module.parameters(recurse=False) if parameter.dim() == 3
    }
    return leading.pop() if len(leading) == 1 else 0


def _expert_bytes(module: nn.Module) -> int:
    return sum(
        parameter.numel() // parameter.shape[0] * parameter.element_size()
        for parameter in module.parameters(recurse=False)
    )
