"""Look-ahead: the model's own routers say which experts the next layers will need.

At the entrance of a layer the hidden state is nearly what its router will see: its norm and router
are applied to it, and what they choose and isn't in fast memory is read ahead
(``residency.experts``). Nearer still it is with what attention added to the tokens before, of which
a running mean is kept: on a small mixture that raises the share of experts foreseen from 0.80 to
0.88. Which module is a layer's norm and which its router shows in the first forward (``routers``).
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..residency.experts import FEW_TOKENS, ExpertSlots
from ..residency.listed import ListedExperts
from ..residency.packed import PackedExperts
from ..telemetry import ExpertStats
from .routers import RoutedLayer, find_layer

PER_LAYER = 2
"""Experts of a layer that are read ahead each time, at most."""
_LATEST = 0.25
"""Weight of the latest token in what attention adds to tokens."""


class LookAhead:
    """Predicts, and reads ahead, while experts are below."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[PackedExperts | ListedExperts],
        slots: ExpertSlots,
        *,
        enabled: bool = True,
    ) -> None:
        self._enabled = enabled
        self._uses = self._foreseen = 0
        self._slots = slots
        self._layers = [
            None if layer is None else _Watched(layer)
            for layer in (
                find_layer(model, each.name) if isinstance(each, PackedExperts) else None
                for each in layers
            )
        ]
        self._handles: list[RemovableHandle] = []
        self._learning: list[RemovableHandle] = []
        self._hooked: frozenset[int] = frozenset()
        """The layers that have experts below."""

    def follow(self) -> None:
        """Work where the plan has experts below."""
        cache = self._slots.cache if self._enabled else None
        below = frozenset(() if cache is None else cache.sizes)
        if below != self._hooked:
            self.remove()
            self._hooked = below
            for number in sorted(below):
                self._hook(number)

    def remove(self) -> None:
        """Leave no hook behind."""
        for handle in (*self._handles, *self._learning):
            handle.remove()
        self._handles.clear()
        self._learning.clear()
        self._hooked = frozenset()

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
            predicted=counted.predicted - self._slots.withdrawn,
            useful=counted.useful,
            wasted=counted.wasted,
            foreseen_uses=self._uses,
            named=self._foreseen,
            prompt_reads=counted.prompt_reads,
        )

    def reset_stats(self) -> None:
        """Start counting anew."""
        self._uses = self._foreseen = 0
        self._slots.reset_counters()
        self._slots.transport.take_link_seconds()

    def routed(self, number: int, index: Tensor, tokens: Sequence[Sequence[int]]) -> None:
        """Hear of a layer's routing: index (tokens, k), and the same as lists."""
        watched = self._layers[number]
        if watched is None:
            return
        if self._learning:
            self._learn(number, watched, index)
        if watched.named and len(tokens) <= FEW_TOKENS:
            used = {expert for token in tokens for expert in token}
            self._uses += len(used)
            self._foreseen += len(used.intersection(watched.named))
        watched.named = []
        if number in self._hooked and watched.layer.norm is not None and len(tokens) <= FEW_TOKENS:
            self._turn(self._slots.foresight.speculation.wants())

    def learn(self, number: int) -> None:
        """Learn from what a layer's router has just seen, once its reads are on their way."""
        watched = self._layers[number]
        if watched is None or watched.entered is None or watched.input is None:
            return
        begun = time.thread_time()
        with torch.no_grad():
            watched.drift = _follow(watched.drift, watched.input, watched.entered)
        watched.entered = watched.input = None
        self._slots.foresight.speculation.lose(time.thread_time() - begun)

    def _turn(self, on: bool) -> None:
        """Have hooks only while predictions are wanted: a module with hooks is called slower."""
        if self._learning or on == bool(self._handles):
            return
        if on:
            for number in sorted(self._hooked):
                self._hook(number)
        else:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()

    def _hook(self, number: int) -> None:
        watched = self._layers[number]
        if watched is None:
            return
        layer = watched.layer

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs.get("hidden_states")
            layer.seen.clear()
            if not isinstance(hidden, Tensor) or layer.norm is None:
                return
            watched.entered = hidden
            if _is_few(hidden) and layer.is_known:
                self._predict(number, watched, hidden)

        self._handles.append(layer.module.register_forward_pre_hook(enter, with_kwargs=True))
        if layer.norm is None:
            self._learning += layer.learn_by()
        else:
            self._hook_norm(number, watched, layer.norm)

    def _hook_norm(self, number: int, watched: "_Watched", norm: nn.Module) -> None:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            watched.input = args[0]

        self._handles.append(norm.register_forward_pre_hook(note))

    def _learn(self, number: int, watched: "_Watched", index: Tensor) -> None:
        """Find a layer's norm and router; what was watched for that goes when all have theirs."""
        layer = watched.layer
        if layer.norm is None and layer.learn(index) and layer.norm is not None:
            self._hook_norm(number, watched, layer.norm)
        hooked = [self._layers[each] for each in self._hooked]
        if all(each is None or each.layer.norm is not None for each in hooked):
            for handle in self._learning:
                handle.remove()
            self._learning.clear()

    def _predict(self, number: int, watched: "_Watched", hidden: Tensor) -> None:
        """Ask a layer's router about a hidden state (batch, tokens, width)."""
        begun = time.thread_time()
        if watched.drift is not None and watched.drift.shape == hidden.shape:
            hidden = hidden + watched.drift
        watched.named = watched.layer.predict(hidden)
        asked = 0
        for expert in dict.fromkeys(watched.named):
            asked += self._slots.expect(number, expert)
            if asked == PER_LAYER:
                break
        # Of this thread: what others take of a core is not the prediction's.
        self._slots.foresight.speculation.lose(time.thread_time() - begun)


class _Watched:
    """A layer, and what attention lately added to its tokens: tensors are (batch, 1, width)."""

    def __init__(self, layer: RoutedLayer) -> None:
        self.layer = layer
        self.named: list[int] = []
        """What was predicted for its next call."""
        self.entered: Tensor | None = None
        """Its input, until its router has its own."""
        self.input: Tensor | None = None
        """What its router's norm was called with."""
        self.drift: Tensor | None = None
        """What that had more than the layer's input."""


def _follow(mean: Tensor | None, hidden: Tensor, before: Tensor) -> Tensor | None:
    """Return the running mean of what was added, with what was added this time."""
    if before.shape != hidden.shape or before.device != hidden.device:
        return mean
    if hidden.dim() != 3:
        return None
    if hidden.shape[1] != 1:
        added = (hidden[:, -FEW_TOKENS:] - before[:, -FEW_TOKENS:]).mean(1, keepdim=True)
        return added if mean is None or not _is_few(hidden) else mean
    added = hidden - before
    return added if mean is None or mean.shape != added.shape else mean.lerp(added, _LATEST)


def _is_few(hidden: Tensor) -> bool:
    return hidden.numel() <= FEW_TOKENS * hidden.shape[-1]
