"""Look-ahead: the model's own routers say which experts the next layers will need.

At the entrance of a layer the hidden state is nearly what the routers of this and the next layer
will see: their norms and routers are applied to it, and what they choose and isn't in fast memory
is read ahead (``residency.experts``). Which module is a layer's norm and which its router shows in
the first forward: the router is the one whose output holds the ids that the experts are called
with, the norm the one whose output the experts' block is called with.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..residency.experts import FEW_TOKENS, ExpertSlots
from ..residency.packed import PackedExperts
from ..residency.stand_ins import OffloadedParameter, plain_tensors
from ..telemetry import ExpertStats

MARGINS = (0.1, 0.4)
"""How far above the first expert that isn't chosen the router's logit must be for an expert to be
read ahead: of the layer that begins, and of the one after it, which is known less well, and is
asked where reads for the first come late. What a router is in two minds about is as often wrong as
right.
"""
PER_LAYER = 2
"""Experts of a layer that are read ahead each time, at most."""


@dataclass(slots=True, eq=False)
class _Layer:
    """A layer with experts, and what was learnt of it."""

    module: nn.Module
    block: nn.Module
    routers: list[nn.Module]
    others: list[nn.Module]
    num_experts: int
    norm: nn.Module | None = None
    router: nn.Module | None = None
    place: int = 0
    """Of the ids in the router's output."""
    logits: int | None = None
    """The place of its logits for all experts, if it returns them."""
    flat: bool = False
    """The router takes (tokens, width)."""
    seen: dict[int, tuple[nn.Module, Any]] = field(default_factory=dict)
    """Outputs of this forward by identity of their tensors, while it is learnt."""
    input: Tensor | None = None
    """What the block was called with, while it is learnt."""
    named: list[int] = field(default_factory=list)
    """What was predicted for its next call."""

    @property
    def is_known(self) -> bool:
        """Its routing can be predicted now."""
        return self.router is not None and self.norm is not None and _is_here(self.norm)

    def predict(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the experts (tokens, k) that its router would choose for each token of a hidden
        state (batch, tokens, width), and by how much (None: it doesn't say).
        """
        assert self.router is not None and self.norm is not None
        x = type(self.norm).forward(self.norm, hidden)
        if self.flat:
            x = x.reshape(-1, x.shape[-1])
        output = type(self.router).forward(self.router, x)
        ids: Tensor = output[self.place]
        ids = ids.reshape(-1, ids.shape[-1])
        if self.logits is None:
            return ids, None
        logits: Tensor = output[self.logits]
        logits = logits.reshape(-1, logits.shape[-1]).float()
        routed = ids.shape[-1]
        if routed == logits.shape[-1]:
            return ids, None
        first_out = logits.topk(routed + 1, dim=-1).values[:, routed:]
        return ids, logits.gather(-1, ids) - first_out


class LookAhead:
    """Predicts, and reads ahead, while experts are below."""

    def __init__(
        self, model: nn.Module, packed: dict[str, PackedExperts], slots: ExpertSlots
    ) -> None:
        self._uses = self._named = 0
        self._slots = slots
        self._layers = [_find_layer(model, name) for name in packed]
        self._handles: list[RemovableHandle] = []
        self._learning: list[RemovableHandle] = []

    def follow(self) -> None:
        """Work where the plan has experts below."""
        if self._slots.cache is None:
            self.remove()
        elif not self._handles:
            for number, layer in enumerate(self._layers):
                if layer is not None:
                    self._hook(number, layer)

    def remove(self) -> None:
        """Leave no hook behind."""
        for handle in (*self._handles, *self._learning):
            handle.remove()
        self._handles.clear()
        self._learning.clear()

    def stats(self) -> ExpertStats | None:
        """Return what decoding met since the last reset; None where no experts are below."""
        cache = self._slots.cache
        if cache is None:
            return None
        counted = cache.counters
        return ExpertStats(
            cache_bytes=cache.capacity_bytes,
            uses=counted.hits + counted.misses,
            resident=counted.hits - counted.useful,
            ready=self._slots.ready,
            reads=counted.misses,
            predicted=counted.predicted,
            useful=counted.useful,
            wasted=counted.wasted,
            foreseen_uses=self._uses,
            named=self._named,
            prompt_reads=counted.prompt_reads,
        )

    def reset_stats(self) -> None:
        """Start counting anew."""
        self._uses = self._named = 0
        self._slots.reset_counters()
        self._slots.transport.take_link_seconds()

    def routed(self, number: int, index: Tensor, tokens: Sequence[Sequence[int]]) -> None:
        """Hear of a layer's routing: index (tokens, k), and the same as lists."""
        layer = self._layers[number]
        if layer is None:
            return
        if layer.router is None:
            _learn(layer, index)
        if layer.named and len(tokens) <= FEW_TOKENS:
            used = {expert for token in tokens for expert in token}
            self._uses += len(used)
            self._named += len(used.intersection(layer.named))
        layer.named = []

    def _hook(self, number: int, layer: _Layer) -> None:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs.get("hidden_states")
            if isinstance(hidden, Tensor):
                self._predict(number, hidden)

        handle = layer.module.register_forward_pre_hook(enter, with_kwargs=True)
        self._handles.append(handle)
        if layer.router is None:
            for module in (*layer.others, *layer.routers):
                self._learning.append(module.register_forward_hook(_remember(layer)))
            self._learning.append(
                layer.block.register_forward_pre_hook(_remember_input(layer), with_kwargs=True)
            )

    def _predict(self, first: int, hidden: Tensor) -> None:
        """Ask the routers of this layer and the next."""
        if hidden.numel() // hidden.shape[-1] > FEW_TOKENS:
            return
        if self._learning and all(each is None or each.router for each in self._layers):
            for handle in self._learning:
                handle.remove()
            self._learning.clear()
        ahead = MARGINS if self._slots.foresight.reads_late else MARGINS[:1]
        for number, least in enumerate(ahead, first):
            layer = self._layers[number] if number < len(self._layers) else None
            if layer is None or not layer.is_known or not self._slots.wants(number):
                continue
            begun = time.perf_counter()
            with torch.no_grad(), plain_tensors():
                chosen, margins = layer.predict(hidden)
                sure = chosen if margins is None else chosen[margins >= least]
            layer.named = chosen.flatten().tolist()
            asked = 0
            for expert in dict.fromkeys(sure.flatten().tolist()):
                asked += self._slots.expect(number, expert)
                if asked == PER_LAYER:
                    break
            self._slots.foresight.speculation.lose(time.perf_counter() - begun)


def _find_layer(model: nn.Module, name: str) -> _Layer | None:
    """Return the layer that has an experts module, an element of a list; None where none has."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if isinstance(model.get_submodule(".".join(parts[: end - 1])), nn.ModuleList):
            module = model.get_submodule(".".join(parts[:end]))
            block = model.get_submodule(".".join(parts[:-1]))
            experts = model.get_submodule(name)
            return _Layer(
                module=module,
                block=block,
                routers=[each for each in block.children() if each is not experts],
                others=[each for each in module.children() if each is not block],
                num_experts=next(experts.parameters()).shape[0],
            )
    return None


def _remember(layer: _Layer) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    def remember(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        for each in outputs:
            if isinstance(each, Tensor):
                layer.seen[id(each)] = module, (args, outputs)

    return remember


def _remember_input(
    layer: _Layer,
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer.input = args[0] if args else kwargs.get("hidden_states")

    return remember


def _learn(layer: _Layer, index: Tensor) -> None:
    """Find a layer's norm and router by what they returned in this forward."""
    router, norm = layer.seen.get(id(index)), layer.seen.get(id(layer.input))
    if router is not None and norm is not None:
        module, (args, outputs) = router
        if module in layer.routers and len(args) == 1 and norm[0] in layer.others:
            layer.place = next(place for place, each in enumerate(outputs) if each is index)
            layer.logits = next(
                (
                    place
                    for place, each in enumerate(outputs)
                    if isinstance(each, Tensor)
                    and each.is_floating_point()
                    and each.shape[-1] == layer.num_experts
                ),
                None,
            )
            layer.flat = args[0].dim() == 2
            layer.router, layer.norm = module, norm[0]
    layer.seen.clear()
    layer.input = None


def _is_here(module: nn.Module) -> bool:
    return not any(isinstance(each, OffloadedParameter) for each in module.parameters())
