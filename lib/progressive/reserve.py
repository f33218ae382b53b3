"""How much memory is kept back: whether a state is safe, and what climbs will probably ask for.

A state is *safe* (Dijkstra's banker; Habermann 1969, CACM 12, 373-377) if all that hold something
could take what they may still need one after the other, each giving all back when it is done. Of
one resource the order by need decides it: if that doesn't work, none does. No torch.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from ..precision.binomial import upper_limit

_CELLS = 1024
"""Of the budget, to which sums of probable climbs are rounded."""


def is_safe(free: int, holders: Iterable[tuple[int, int]]) -> bool:
    """Say whether an order exists in which all get what they need; (held, needed) of each."""
    for held, needed in sorted(holders, key=lambda holder: holder[1]):
        if needed > free:
            return False
        free += held
    return free >= 0


def probable_bytes(
    climbs: Sequence[tuple[int, float]], *, quantile: float, budget_bytes: int
) -> int:
    """Return a quantile of the sum of what climbs take; (bytes, chance) of each, independent.

    The distribution is that of a sum of Bernoulli variables, in steps of a 1024th of the budget; at
    most what all of them take, and the whole budget.
    """
    chances = np.zeros(_CELLS + 1)
    chances[0] = 1.0
    for num_bytes, chance in climbs:
        step = min(_CELLS, round(num_bytes / budget_bytes * _CELLS))
        if step and chance:
            moved = chances * chance
            chances -= moved
            chances[step:] += moved[: _CELLS + 1 - step]
            chances[-1] += moved[_CELLS + 1 - step :].sum()
    cell = int(np.searchsorted(np.cumsum(chances), quantile - 1e-12))
    most = sum(num_bytes for num_bytes, _ in climbs)  # steps are rounded, up too
    return min(most, budget_bytes, -(-cell * budget_bytes // _CELLS))


class EscalationRates:
    """How often the requests of each class climb, from those that did or didn't.

    ``history``: class -> (climbed, seen), of earlier ones.
    """

    def __init__(self, history: Mapping[str, tuple[int, int]] | None = None) -> None:
        history = history or {}
        self._climbed = Counter({kind: climbed for kind, (climbed, _) in history.items()})
        self._decided = Counter({kind: seen for kind, (_, seen) in history.items()})

    def count(self, kind: str, *, climbed: bool) -> None:
        """Take one request into account."""
        self._decided[kind] += 1
        self._climbed[kind] += climbed

    def upper(self, kind: str) -> float:
        """Return the upper limit (Clopper-Pearson, 95 %) of the chance to climb: 1 for a class of
        which none was seen.
        """
        return upper_limit(self._climbed[kind], self._decided[kind])

    def seen(self, kind: str) -> float:
        """Return the share of a class that climbed: 0 while none was seen."""
        return self._climbed[kind] / max(1, self._decided[kind])

    def to_dict(self) -> dict[str, tuple[int, int]]:
        """Return class -> (climbed, seen)."""
        return {kind: (self._climbed[kind], seen) for kind, seen in self._decided.items()}
