"""Packed experts that are held apart, computed one by one: transformers' interface for experts says
which are routed to before any weight is touched.

Products are those of each expert's rows, and are added up in the order of ``grouped_mm``, which
gives the bits that this has on a CPU (for widths that are multiples of 32: torch computes the last
few of a run of activations by another exponential); where the model computed by ``eager``, those of
that. Compressed experts are multiplied with as records.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...blocks import EXPERTS_IMPLEMENTATION
from ...errors import PlacementError
from ..residency.experts import ExpertSlots, Weights
from ..residency.packed import PACKED, PackedExperts, given_implementation
from ..residency.residency import Residency
from ..residency.stand_ins import NO_GRADIENTS
from .lookahead import LookAhead


def serve_experts(model: nn.Module, residency: Residency, *, look_ahead: bool) -> LookAhead:
    """Let modules compute with experts that are held apart, or in slots for a while; returns what
    reads them ahead.
    """
    slots = residency.experts
    lookahead = LookAhead(model, residency.layers, slots, enabled=look_ahead)
    if residency.packed:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, _forward)
    for layer, each in enumerate(residency.layers):
        if isinstance(each, PackedExperts):
            each.compute = RoutedExperts(layer, each, slots, lookahead)
    return lookahead


def _forward(module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Compute what transformers asks of an experts module: hidden (tokens, width), index and
    weights (tokens, k) -> (tokens, width).
    """
    packed = PACKED.get(module)
    if packed is not None and not packed.is_plain:
        assert packed.compute is not None
        return packed.compute(hidden, index, weights)
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    eager = type(module).forward.__wrapped__  # type: ignore[attr-defined]
    compute = ALL_EXPERTS_FUNCTIONS.get(given_implementation(module.config), eager)
    output: Tensor = compute(module, hidden, index, weights)
    return output


class RoutedExperts:
    """The calls of one experts module, the ``layer``-th of those in ``slots``."""

    def __init__(
        self, layer: int, packed: PackedExperts, slots: ExpertSlots, lookahead: LookAhead
    ) -> None:
        self._layer = layer
        self._lookahead = lookahead
        self._packed = packed
        self._slots = slots
        self._products = _Products(packed)
        self._learn = partial(lookahead.learn, layer)

    def __call__(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Return what the experts make of hidden, in its dtype."""
        if torch.is_grad_enabled() and (hidden.requires_grad or weights.requires_grad):
            raise PlacementError(f"inputs require gradients, {NO_GRADIENTS}")
        if not index.numel():
            return torch.zeros_like(hidden)
        tokens: list[list[int]] = index.tolist()
        self._lookahead.routed(self._layer, index, tokens)
        if len(tokens) == 1:
            return self._one_token(hidden, tokens, weights)
        routed = len(tokens[0])
        pairs: dict[int, list[int]] = {}
        for rank in range(routed):
            for place, experts in enumerate(tokens):
                pairs.setdefault(experts[rank], []).append(place * routed + rank)
        outputs: Tensor | None = None
        with self._packed.memory.watcher.alone():
            for expert, held in self._held(tokens):
                rows = torch.tensor(pairs[expert], device=hidden.device)
                output = self._products(hidden[rows // routed], held)
                if outputs is None:
                    outputs = output.new_empty(len(tokens) * routed, output.shape[-1])
                outputs[rows] = output
        assert outputs is not None
        weighted = outputs * weights.reshape(-1, 1)
        if self._packed.implementation != "eager":
            return weighted.view(len(tokens), routed, -1).sum(dim=1).to(hidden.dtype)
        total = torch.zeros_like(hidden)
        for expert in sorted(pairs):
            rows = torch.tensor(pairs[expert], device=hidden.device)
            total.index_add_(0, rows // routed, weighted[rows].to(hidden.dtype))
        return total

    def _one_token(self, hidden: Tensor, tokens: list[list[int]], weights: Tensor) -> Tensor:
        """Return the same with fewer operations, for what decoding does most."""
        found: dict[int, Tensor] = {}
        with self._packed.memory.watcher.alone():
            for expert, held in self._held(tokens):
                found[expert] = self._products(hidden, held)
        (experts,) = tokens
        weighted = torch.cat([found[expert] for expert in experts]) * weights.reshape(-1, 1)
        if self._packed.implementation != "eager":
            return weighted.sum(dim=0, keepdim=True).to(hidden.dtype)
        total = torch.zeros_like(hidden)
        for expert in sorted(experts):
            total += weighted[experts.index(expert)].to(hidden.dtype)
        return total

    def _held(self, tokens: Sequence[Sequence[int]]) -> Iterator[tuple[int, Weights]]:
        """Yield the experts that are routed to, each with its weights in fast memory."""
        if self._slots.cache is not None and self._layer in self._slots.cache.sizes:
            yield from self._slots.use(self._layer, tokens, meanwhile=self._learn)
            return
        for expert in dict.fromkeys(number for token in tokens for number in token):
            self._packed.memory.watcher.called(self._packed.experts[expert].name)
            yield expert, self._packed.held[expert]


class _Products:
    """What one expert computes, from the forms in which transformers' models have their weights."""

    def __init__(self, packed: PackedExperts) -> None:
        self._module: Any = packed.module
        self._implementation = packed.implementation
        prefix = packed.experts[0].payload.group.modules[0]
        self._up = f"{prefix}.{'gate_up_proj' if self._module.has_gate else 'up_proj'}"
        self._down = f"{prefix}.down_proj"

    def __call__(self, x: Tensor, weights: Weights) -> Tensor:
        """Return one expert's output for rows of activations, before routing weights."""
        module = self._module
        up = self._linear(x, weights, self._up)
        inner = module._apply_gate(up) if module.has_gate else module.act_fn(up)
        output = self._linear(inner, weights, self._down)
        if getattr(module, "has_post_expert_norm", False):
            return module.post_expert_norm(output)  # type: ignore[no-any-return]
        return output

    def _linear(self, x: Tensor, weights: Weights, name: str) -> Tensor:
        weight, bias = weights[name], weights.get(f"{name}_bias")
        assert bias is None or isinstance(bias, Tensor)
        if not isinstance(weight, Tensor):
            return weight.linear(x, bias)
        # transformers' grouped products are left alone by autocast, and no others.
        grouped = self._implementation == "grouped_mm"
        if grouped and torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                output = self._product(x.to(weight.dtype), weight)
        else:
            output = self._product(x.to(weight.dtype), weight)
        return output if bias is None else output.add_(bias)

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight if self._module.is_transposed else F.linear(x, weight)
