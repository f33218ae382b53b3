"""What a mixture's routers choose in a decoding of given text, and what was predicted of it.

Read off an attached model, whose look-ahead knows each layer's norm and router. Predictions are
those of the engine's look-ahead for the layer that begins, and the control: the same router asked
with its true input, which must choose what was chosen.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from lib.policy.experts.routing import Call
from lib.policy.experts.simulate import Guesses
from lib.tiering import Runtime
from lib.tiering.residency.foresight import Foresight


@dataclass(slots=True)
class Recording:
    """Calls in their order; by place the experts named at the layer's entrance; recalls by layer.

    ``recall`` and ``control`` hold per layer (named, used).
    """

    calls: list[Call] = field(default_factory=list)
    named: dict[int, list[int]] = field(default_factory=dict)
    recall: dict[int, list[int]] = field(default_factory=dict)
    control: dict[int, list[int]] = field(default_factory=dict)

    def share(self, counted: dict[int, list[int]], *, first: int = 0) -> float:
        """Return the share of used experts that were named, in layers from ``first`` on."""
        chosen = [pair for layer, pair in counted.items() if layer >= first]
        return sum(named for named, _ in chosen) / sum(used for _, used in chosen)

    def guesses(self) -> Guesses:
        """Return what was named, as if it had been known one call before: more lead than the engine
        has, so what a simulator makes of it is a ceiling.
        """
        return {
            place - 1: [(place, tuple(named))] for place, named in self.named.items() if place > 0
        }


def record(runtime: Runtime, decode: Callable[[], Any]) -> Recording:
    """Record while ``decode`` runs the model, one sequence at a time. It must have run before."""
    keeper = runtime._keeper
    lookahead = keeper.forwards.lookahead
    recording = Recording()
    named: dict[int, list[int]] = {}
    true: dict[int, list[int]] = {}
    handles = []
    for number, packed in enumerate(keeper.residency.packed):
        watched = lookahead._layers[number]
        assert watched is not None
        layer = watched.layer
        assert layer.norm is not None

        def enter(
            module: nn.Module, args: Any, kwargs: Any, number: int = number, watched: Any = watched
        ) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            if hidden.shape[1] == 1:
                added = watched.drift
                moved = hidden if added is None or added.shape != hidden.shape else hidden + added
                named[number] = watched.layer.predict(moved)

        def note(module: nn.Module, args: Any, number: int = number, layer: Any = layer) -> None:
            if args[0].shape[1] == 1:
                true[number] = layer.predict(args[0])

        def route(module: nn.Module, args: Any, kwargs: Any, number: int = number) -> None:
            index: Tensor = [*args, *kwargs.values()][1]
            tokens = tuple(tuple(experts) for experts in index.tolist())
            decoding = len(tokens) == 1
            if decoding:
                (used,) = tokens
                for guess, counted in ((named, recording.recall), (true, recording.control)):
                    pair = counted.setdefault(number, [0, 0])
                    pair[0] += len(set(used).intersection(guess[number]))
                    pair[1] += len(used)
                recording.named[len(recording.calls)] = named[number]
            recording.calls.append(Call(number, tokens, decoding))

        handles += [
            layer.module.register_forward_pre_hook(enter, with_kwargs=True),
            layer.norm.register_forward_pre_hook(note),
            packed.module.register_forward_pre_hook(route, with_kwargs=True),
        ]
    try:
        with torch.no_grad(), _always_predicting(keeper.residency.experts.foresight):
            decode()
    finally:
        for handle in handles:
            handle.remove()
    return recording


@contextlib.contextmanager
def _always_predicting(foresight: Foresight) -> Iterator[None]:
    """Predict, and learn what attention adds, whether it pays or not."""
    foresight.clear()
    with mock.patch.object(foresight.speculation, "wants", return_value=True):
        yield
    foresight.clear()
