"""Look-ahead: the model's own routers say which experts the next layers will need.

At the entrance of a layer the hidden state is nearly what its router will see: its norm and router
are applied to it, and what they choose and isn't in fast memory is read ahead
(``residency.experts``). Nearer still it is with what attention added to the tokens before, of which
a running mean is kept: on a small mixture that raises the share of experts foreseen from 0.80 to
0.88. Where such reads come late, the layer after the present one is asked as well, with what its
router's input had more than the present one's. Which module is a layer's norm and which its router
shows in the first forward (``routers``).
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
from ..residency.stand_ins import plain_tensors
from ..telemetry import ExpertStats
from .routers import RoutedLayer, find_layer

MARGINS = (0.0, 0.2)
"""How far above the first expert that isn't chosen the router's logit must be for an expert to be
read ahead: of the layer that begins, and of the one after it, which is known less well. What a
router is in two minds about is as often wrong as right.
"""
PER_LAYER = 2
"""Experts of a layer that are read ahead each time, at most."""
_LATEST = 0.25
"""Weight of the latest token in what layers add to tokens."""


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
        self._asked: int | None = None
        """The layer whose router's input came last, until the one after it was asked."""

    def follow(self) -> None:
        """Work where the plan has experts below."""
        cache = self._slots.cache if self._enabled else None
        below = frozenset(() if cache is None else cache.sizes)
        if below != self._hooked:
            self.remove()
            self._hooked = below
            for number in sorted(below):
                if (watched := self._layers[number]) is not None:
                    self._hook(number, watched)

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

    def look_on(self, number: int) -> None:
        """Ask the layer after one whose own reads are on their way, where reads come late."""
        if self._asked != number:
            return
        self._asked = None
        here, watched = self._layers[number], self._layer(number + 1)
        if here is None or here.input is None or watched is None or watched.step is None:
            return
        if self._slots.foresight.reads_late and here.input.shape == watched.step.shape:
            self._predict(number + 1, watched, here.input, watched.step, MARGINS[1])

    def _layer(self, number: int) -> "_Watched | None":
        return self._layers[number] if number < len(self._layers) else None

    def _hook(self, number: int, watched: "_Watched") -> None:
        layer = watched.layer

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs.get("hidden_states")
            layer.seen.clear()
            if isinstance(hidden, Tensor) and layer.norm is not None:
                watched.entered = hidden
                if _is_few(hidden):
                    self._predict(number, watched, hidden, watched.drift, MARGINS[0])

        self._handles.append(layer.module.register_forward_pre_hook(enter, with_kwargs=True))
        if layer.norm is None:
            self._learning += layer.learn_by()
        else:
            self._hook_norm(number, watched, layer.norm)

    def _hook_norm(self, number: int, watched: "_Watched", norm: nn.Module) -> None:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            before = (
                self._layers[number - 1] if number and self._slots.foresight.reads_late else None
            )
            with torch.no_grad():
                watched.note(args[0], None if before is None else before.input)
            if before is not None:
                before.input = None
            self._asked = number if _is_few(args[0]) else None

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

    def _predict(
        self,
        number: int,
        watched: "_Watched",
        hidden: Tensor,
        added: Tensor | None,
        margin: float,
    ) -> None:
        """Ask a layer's router about a hidden state (batch, tokens, width)."""
        if not watched.layer.is_known or not self._slots.wants(number):
            return
        begun = time.thread_time()
        with plain_tensors():
            if added is not None and added.shape == hidden.shape:
                hidden = hidden + added
            chosen, sure = watched.layer.predict(hidden, margin)
        # Of this thread: what others take of a core is not the prediction's.
        self._slots.foresight.speculation.lose(time.thread_time() - begun)
        if margin == MARGINS[0]:
            watched.named = chosen
        asked = 0
        for expert in dict.fromkeys(sure):
            asked += self._slots.expect(number, expert)
            if asked == PER_LAYER:
                break


class _Watched:
    """A layer, and what it lately added to its tokens: tensors are (batch, 1, width)."""

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
        self.step: Tensor | None = None
        """What that had more than the input of the router before it."""

    def note(self, hidden: Tensor, before: Tensor | None) -> None:
        """Learn from what the router's norm is called with, and was in the layer before."""
        self.drift = _follow(self.drift, hidden, self.entered)
        self.step = _follow(self.step, hidden, before)
        self.entered, self.input = None, hidden


def _follow(mean: Tensor | None, hidden: Tensor, before: Tensor | None) -> Tensor | None:
    """Return the running mean of what was added, with what was added this time."""
    if before is None or before.shape != hidden.shape or before.device != hidden.device:
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
