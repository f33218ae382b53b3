"""Which half-life suits: a copy of the cache's bookkeeping per half-life, on a few layers.

Each ghost holds what the cache would hold of its layers if its half-life had been the choice from
the start, within those layers' share of the capacity. All see the same steps, so two of them are
compared use by use: of the uses that only one of both had, a choice is left when another has more
by SIGMAS standard deviations of a fair coin's (McNemar's test). It starts at 16 calls, between
recency and frequency.

What ghosts do is put off until something is read, or a few calls have gathered: then it costs no
time that isn't waited anyway.
"""

import math
from collections.abc import Mapping, Sequence

from .residents import Expert
from .values import HALF_LIVES, FadingUses, distinct

SIGMAS = 2.0
PERIOD = 512
WATCHED = 80
SETTLING = 16

_GHOST_USES = 24
"""Uses per token, at least, that ghosts see: more layers cost time, fewer are told apart late."""

_GATHERED = 8
"""Calls after which ghosts hear of them even if nothing was read."""

_MEMORY = 512
"""Differing uses after which what was counted is halved: text changes."""


class _Ghost:
    """What the cache would hold of some layers at one half-life: by expert its key, in the order of
    last use. It is small, so what goes is looked for among all.
    """

    def __init__(self, sizes: Mapping[int, Sequence[int]]) -> None:
        self.keys: dict[Expert, float] = {}
        self._sizes = sizes
        self._shifts: dict[int, float] = dict.fromkeys(sizes, 0.0)
        self._capacity_bytes = self._used_bytes = 0

    def resize(self, capacity_bytes: int) -> None:
        """Let go of what is above a capacity."""
        self._capacity_bytes = capacity_bytes
        self._make_room(0, math.inf)

    def use(
        self, layer: int, keys: Mapping[Expert, float], shift: float, *, bypasses: bool
    ) -> frozenset[Expert]:
        """Hold what a layer's call uses, or with ``bypasses`` what of that is worth it; returns
        what was held.
        """
        self._shifts[layer] = shift
        held = self.keys
        hits = frozenset(expert for expert in keys if expert in held)
        for expert in hits:  # none goes for the others
            del held[expert]
        came = {}
        for expert, key in keys.items():
            size = self._sizes[layer][expert[1]]
            if expert in hits:
                came[expert] = key
            elif self._make_room(size, key - shift if bypasses else math.inf):
                self._used_bytes += size
                (held if bypasses else came)[expert] = key
        held.update(came)
        return hits

    def _make_room(self, num_bytes: int, worth: float) -> bool:
        """Let go of what is worth less; returns whether so many bytes are free."""
        keys, shifts = self.keys, self._shifts
        while self._used_bytes + num_bytes > self._capacity_bytes:
            first = min(keys, key=lambda expert: keys[expert] - shifts[expert[0]], default=None)
            if first is None or keys[first] - shifts[first[0]] >= worth:
                return False
            del keys[first]
            self._used_bytes -= self._sizes[first[0]][first[1]]
        return True


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
        self._ghosts = [_Ghost(self._ghost_sizes) for _ in half_lives]
        self._bypasses = False
        self._watched = dict.fromkeys(layers, 0)
        self._untold: list[tuple[int, int, Sequence[int], Sequence[Sequence[float]]]] = []
        """Calls that ghosts have not heard of: layer, number, what it used, and the scores then."""
        self._forget()

    def resize(self, capacity_bytes: int, *, bypasses: bool) -> None:
        """Give the ghosts their share of the capacity."""
        self.learn()
        self._bypasses = bypasses
        whole = sum(map(sum, self._sizes.values()))
        share = sum(map(sum, self._ghost_sizes.values())) / whole
        for ghost in self._ghosts:
            ghost.resize(max(self._smallest, int(capacity_bytes * share)))

    def touch(self, layer: int, experts: Sequence[int], call: int) -> None:
        """Count the uses; ghosts hear of them in ``learn``."""
        super().touch(layer, experts, call)
        if not self._is_watched(layer, call):
            return
        scores = [self._scores[layer, index] for index in experts]
        self._untold.append((layer, call, experts, scores))
        if len(self._untold) == _GATHERED:
            self.learn()

    def learn(self) -> None:
        """Let ghosts hear of the uses since they last did; every now and then, choose again."""
        for uses in self._untold:
            self._tell(*uses)
        self._untold.clear()

    def _tell(
        self, layer: int, call: int, experts: Sequence[int], scores: Sequence[Sequence[float]]
    ) -> None:
        self._catch_up(layer, call)
        named = [(layer, index) for index in experts]
        hits = []
        for way, ghost in enumerate(self._ghosts):
            shift = call * self.rates[way]
            keys = {
                expert: math.log2(each[way]) + shift
                for expert, each in zip(named, scores, strict=True)
            }
            hits.append(ghost.use(layer, keys, shift, bypasses=self._bypasses))
        if call >= PERIOD and call % PERIOD < SETTLING:
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
        self.learn()
        super().touch_prompt(layer, tokens, call)
        if self._is_watched(layer, call):
            self._catch_up(layer, call)
            experts = [(layer, index) for index in distinct(tokens)]
            for way, ghost in enumerate(self._ghosts):
                keys = {expert: self.key_at(expert, way) for expert in experts}
                ghost.use(layer, keys, call * self.rates[way], bypasses=True)

    def _is_watched(self, layer: int, call: int) -> bool:
        """Say whether the ghosts see this call."""
        return layer in self._ghost_sizes and call % PERIOD < WATCHED

    def _catch_up(self, layer: int, call: int) -> None:
        """Let the ghosts hear what they have missed of a layer in a pause before this call."""
        if call > self._watched[layer] + 1:
            for way, ghost in enumerate(self._ghosts):
                for expert in ghost.keys:
                    if expert[0] == layer:
                        ghost.keys[expert] = self.key_at(expert, way)
        self._watched[layer] = call

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
