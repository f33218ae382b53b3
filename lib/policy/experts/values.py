"""What a resident expert is worth: by its last use, its uses, counts given, uses that fade.

Each way is a class with ``rates``, of which one is ``chosen``: what its layer's keys lose per call,
in units of its keys. Keys stand still between uses, as ``residents`` wants them.

A prompt's pass over a layer is one use of each of its experts for recency and frequency. For uses
that fade it is one call of the layer too, and its weight the share of the prompt's tokens that
chose the expert, late tokens counting more: a long prompt is never worth more than one decode step,
and does not flush what decoding has gathered.
"""

import math
from collections.abc import Mapping, Sequence

from .residents import Expert


class Values:
    """All alike, so that only the order of uses counts, which ``Residents`` knows by itself: LRU.

    The others derive from it. An expert's key changes only when it is touched, or with ``chosen``.
    """

    rates: Sequence[float] = (0.0,)
    chosen = 0

    def touch(self, layer: int, experts: Sequence[int], call: int) -> None:
        """Count one decode step's use of a layer's experts, in its call number ``call``."""

    def touch_prompt(self, layer: int, tokens: Sequence[Sequence[int]], call: int) -> None:
        """Count a prompt's pass over a layer: the experts of each of its tokens, first to last."""
        self.touch(layer, distinct(tokens), call)

    def learn(self) -> None:
        """Do what was put off until there is time for it."""

    def key(self, expert: Expert) -> float:
        """Return an expert's key at the rate chosen."""
        return 0.0

    def resize(self, capacity_bytes: int, *, bypasses: bool) -> None:
        """Hear of the capacity, and whether steps hold only what is worth it."""


class Frequency(Values):
    """LFU: uses since the start, evicted or not; of equals the least lately used goes."""

    def __init__(self) -> None:
        self._uses: dict[Expert, int] = {}

    def touch(self, layer: int, experts: Sequence[int], call: int) -> None:
        """Count one use of each."""
        for index in experts:
            self._uses[layer, index] = self._uses.get((layer, index), 0) + 1

    def key(self, expert: Expert) -> float:
        """Return the uses."""
        return float(self._uses.get(expert, 0))


class Popularity(Values):
    """Counts given at the start, for good: those of training, or of a prompt."""

    def __init__(self, counts: Mapping[Expert, float]) -> None:
        self._counts = counts

    def key(self, expert: Expert) -> float:
        """Return the count given."""
        return float(self._counts.get(expert, 0.0))


HALF_LIVES = (1.0, 4.0, 16.0, 64.0, math.inf)
"""Calls of a layer after which a use counts half: from recency to frequency."""

WARM_CALLS = 16
"""Calls of each layer that router counts of the training stand for."""


class FadingUses(Values):
    """Uses that fade by half in so many calls of their layer, at several half-lives at once.

    The score s of an expert is the sum over its uses of 2^-(calls since / half-life): LRFU's
    combined recency and frequency (Lee et al., IEEE Trans. Computers 50(12), 2001), on a clock per
    layer. The key is log2(s) + call / half-life with s as of the last use at ``call``; less the
    layer's calls / half-life it is log2 of the score now. On its layer's clock an expert that has
    yet to be asked for in this step has not aged for it: just passed layers go first, as their
    next use is furthest, and a cycle longer than the capacity does not flush itself as with LRU.

    ``counts`` are router counts: before its first uses an expert has the score that WARM_CALLS
    calls would have given it on average; ``per_token`` is by layer how many experts a token uses.
    """

    def __init__(
        self,
        half_lives: Sequence[float] = HALF_LIVES,
        *,
        chosen: int = 2,
        counts: Mapping[Expert, float] | None = None,
        per_token: Mapping[int, int] | None = None,
    ) -> None:
        self.rates: Sequence[float] = tuple(1 / half_life for half_life in half_lives)
        self.chosen = chosen
        self._fades = [2.0**-rate for rate in self.rates]
        self._scores: dict[Expert, list[float]] = {}
        self._calls: dict[Expert, int] = {}
        if counts:
            self._start_warm(counts, per_token or {})

    def touch(self, layer: int, experts: Sequence[int], call: int) -> None:
        """Fade each expert's score to now and add one."""
        for index in experts:
            self._add((layer, index), call, None)

    def touch_prompt(self, layer: int, tokens: Sequence[Sequence[int]], call: int) -> None:
        """Add to each expert its share of the prompt's tokens, which fade as calls do."""
        weights: dict[int, list[float]] = {}
        for way, fade in enumerate(self._fades):
            weight = 1 / len(tokens) if fade == 1 else 1 - fade
            for experts in reversed(tokens):
                for index in experts:
                    weights.setdefault(index, [0.0] * len(self._fades))[way] += weight
                weight *= fade
        for index, added in weights.items():
            self._add((layer, index), call, added)

    def key(self, expert: Expert) -> float:
        """Return log2 of the score as of the last use, plus that use's call over the half-life."""
        return self.key_at(expert, self.chosen)

    def key_at(self, expert: Expert, way: int) -> float:
        """Return the key at the rate number ``way``."""
        scores = self._scores.get(expert)
        if scores is None or not scores[way]:
            return -math.inf
        return math.log2(scores[way]) + self._calls[expert] * self.rates[way]

    def _add(self, expert: Expert, call: int, added: list[float] | None) -> None:
        more = added or [1.0] * len(self._fades)
        scores = self._scores.get(expert)
        if scores is not None:
            since = call - self._calls[expert]
            more = [
                score * fade**since + each
                for score, fade, each in zip(scores, self._fades, more, strict=True)
            ]
        self._scores[expert] = more
        self._calls[expert] = call

    def _start_warm(self, counts: Mapping[Expert, float], per_token: Mapping[int, int]) -> None:
        totals: dict[int, float] = {}
        for (layer, _), count in counts.items():
            totals[layer] = totals.get(layer, 0.0) + count
        for expert, count in counts.items():
            if count:
                share = count / totals[expert[0]] * per_token[expert[0]]
                self._scores[expert] = [
                    share * (WARM_CALLS if fade == 1 else (1 - fade**WARM_CALLS) / (1 - fade))
                    for fade in self._fades
                ]
                self._calls[expert] = 0


def distinct(tokens: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return the experts of several tokens, each once, in the order they are first asked for."""
    return tuple(dict.fromkeys(index for experts in tokens for index in experts))
