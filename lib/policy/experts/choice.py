"""Which half-life suits: a copy of the cache's bookkeeping per half-life, on a few layers.

Each ghost holds what the cache would hold of its layers if its half-life had been the choice from
the start, within those layers' share of the capacity. All see the same steps, so two of them are
compared use by use: of the uses that only one of both had, a choice is left when another has more
by SIGMAS standard deviations of a fair coin's (McNemar's test). It starts at 16 calls, between
recency and frequency.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial

from .residents import Expert, Residents
from .values import HALF_LIVES, FadingUses, distinct

SIGMAS = 2.0
FIRST = 256
PERIOD = 512
WATCHED = 80
SETTLING = 16

_GHOST_USES = 24
"""Uses per token, at least, that ghosts see: more layers cost time, fewer are told apart late."""

_MEMORY = 512
"""Differing uses after which what was counted is halved: text changes."""


class ChosenFading(FadingUses):
    """Uses that fade at the half-life of which most hits have come.

    ``sizes`` and ``per_token`` are those of ``ExpertCache``.
    """

    def __init__(
        self,
        sizes: Mapping[int, Sequence[int]],
        *,
        per_token: Mapping[int, int],
        counts: Mapping[Expert, float] | None = None,
        half_lives: Sequence[float] = HALF_LIVES,
    ) -> None:
        super().__init__(half_lives, counts=counts, per_token=per_token)
        self._sizes = sizes
        layers = _spread(sizes, per_token)
        self._ghost_sizes = {layer: sizes[layer] for layer in layers}
        self._smallest = max(
            sum(sorted(sizes[layer], reverse=True)[: per_token[layer]]) for layer in layers
        )
        self._ghosts = [Residents(self._ghost_sizes, 0) for _ in half_lives]
        self._bypasses = False
        self._watched = dict.fromkeys(layers, 0)
        self._forget()

    def resize(self, capacity_bytes: int, *, bypasses: bool) -> None:
        """Give the ghosts their share of the capacity."""
        self._bypasses = bypasses
        whole = sum(map(sum, self._sizes.values()))
        share = sum(map(sum, self._ghost_sizes.values())) / whole
        for ghost in self._ghosts:
            ghost.capacity_bytes = max(self._smallest, int(capacity_bytes * share))
            ghost.make_room(0)

    def touch(self, layer: int, experts: Sequence[int], call: int) -> None:
        """Count the uses; every now and then, choose again."""
        super().touch(layer, experts, call)
        if not self._watches(layer, call):
            return
        hits = []
        for way, ghost in enumerate(self._ghosts):
            ghost.shift(layer, call * self.rates[way])
            enter = ghost.offer if self._bypasses else ghost.admit
            admission = enter(layer, experts, partial(self.key_at, way=way))
            hits.append(frozenset(admission.hits))
        if call > FIRST and call % PERIOD < SETTLING:
            return
        mine = hits[self.chosen]
        for way, others in enumerate(hits):
            if others != mine:
                self._gained[way] += len(others - mine)
                self._lost[way] += len(mine - others)
                self._fade_counts(way)
        self._choose()

    def touch_prompt(self, layer: int, tokens: Sequence[Sequence[int]], call: int) -> None:
        """Count the shares of the tokens; ghosts take it in too, and nothing is judged by it."""
        super().touch_prompt(layer, tokens, call)
        if self._watches(layer, call):
            for way, ghost in enumerate(self._ghosts):
                ghost.shift(layer, call * self.rates[way])
                ghost.offer(layer, distinct(tokens), partial(self.key_at, way=way))

    def _watches(self, layer: int, call: int) -> bool:
        """Say whether the ghosts see this call; after a pause, they hear what they have missed."""
        if layer not in self._ghost_sizes or (call > FIRST and call % PERIOD >= WATCHED):
            return False
        if call > self._watched[layer] + 1:
            for way, ghost in enumerate(self._ghosts):
                for expert in ghost.experts():
                    if expert[0] == layer:
                        ghost.change_key(expert, self.key_at(expert, way))
        self._watched[layer] = call
        return True

    def _choose(self) -> None:
        """Go to the half-life that is ahead by most deviations, where that is enough."""
        best, most = self.chosen, SIGMAS
        for way, (gained, lost) in enumerate(zip(self._gained, self._lost, strict=True)):
            if gained > lost and (gained - lost) / math.sqrt(gained + lost) > most:
                best, most = way, (gained - lost) / math.sqrt(gained + lost)
        if best != self.chosen:
            self.chosen = best
            self._forget()

    def _forget(self) -> None:
        self._gained = [0.0] * len(self._ghosts)
        self._lost = [0.0] * len(self._ghosts)

    def _fade_counts(self, way: int) -> None:
        if self._gained[way] + self._lost[way] > _MEMORY:
            self._gained[way] /= 2
            self._lost[way] /= 2


def _spread(sizes: Mapping[int, Sequence[int]], per_token: Mapping[int, int]) -> list[int]:
    """Return layers, evenly apart, that are enough for the ghosts."""
    layers = sorted(sizes)
    uses = sum(per_token[layer] for layer in layers) / len(layers)
    count = min(len(layers), math.ceil(_GHOST_USES / uses))
    return [layers[index * len(layers) // count] for index in range(count)]
