"""Filling a capacity with things of equal kinds: most value, and hardly a byte left free.

A bounded knapsack. Kinds far above or below the break of the greedy order are settled by it; the
kinds around the break are searched over Pareto-optimal (weight, value) states, thinned to a fixed
number, so the time is bounded and the result is within a hair of optimal (Pisinger's "core" idea,
with Nemhauser and Ullmann's lists).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

_CORE_KINDS = 14
_CORE_COUNT = 63
"""At most so many things of a kind are put in question; the rest of the kind is settled."""
_MAX_STATES = 256
_CLOSE_ENOUGH = 1e-6
"""Relative distance to the bound at which nothing better is looked for."""


@dataclass(frozen=True, slots=True)
class Kind:
    """``count`` equal things, each of a weight (> 0 or 0) and a value."""

    weight: int
    value: float
    count: int


_Trail = tuple[int, int, "_Trail | None"]
"""Index of a kind, how many of it, and what was taken before."""
_State = tuple[int, float, _Trail | None]
"""Weight, value, what was taken."""


def fill(kinds: Sequence[Kind], capacity: int) -> list[int]:
    """Return how many of each kind to take. Things without value are left out."""
    order = sort_by_density(kinds)
    taken, break_at = _greedy(kinds, order, capacity)
    if break_at is None:
        return taken
    bound = fractional_value(kinds, order, capacity)
    core = _core(kinds, order, break_at)
    low = {index: max(0, taken[index] - _CORE_COUNT // 2) for index in core}
    high = {index: min(kinds[index].count, low[index] + _CORE_COUNT) for index in core}
    fixed = [low[index] if index in low else taken[index] for index in range(len(kinds))]
    # What lies below the core is taken up again at the end, where it still fits.
    for index in order[break_at:]:
        if index not in low:
            fixed[index] = 0
    settled = sum(kind.weight * count for kind, count in zip(kinds, fixed, strict=True))
    value = sum(kind.value * count for kind, count in zip(kinds, fixed, strict=True))
    best = _search(
        kinds,
        [(index, high[index] - low[index]) for index in core],
        capacity - settled,
        bound - value,
    )
    counts = list(fixed)
    trail = best[2]
    while trail is not None:
        index, count, trail = trail
        counts[index] += count
    _top_up(kinds, order, counts, capacity - settled - best[0])
    return max(counts, taken, key=lambda chosen: _total_value(kinds, chosen))


def fractional_value(kinds: Sequence[Kind], order: Sequence[int], capacity: int) -> float:
    """Return what could be had if things could be cut: no choice is worth more.

    ``order`` is that of ``sort_by_density``.
    """
    value = 0.0
    for index in order:
        kind = kinds[index]
        if kind.weight * kind.count > capacity:
            return value + kind.value * capacity / kind.weight
        capacity -= kind.weight * kind.count
        value += kind.value * kind.count
    return value


def sort_by_density(kinds: Sequence[Kind]) -> list[int]:
    """Order the kinds of any value by value per byte, large things first where it is equal."""
    densities = [
        (-kind.value / kind.weight if kind.weight else -math.inf, -kind.weight, index)
        for index, kind in enumerate(kinds)
        if kind.value > 0
    ]
    return [index for _, _, index in sorted(densities)]


def _greedy(
    kinds: Sequence[Kind], order: Sequence[int], capacity: int
) -> tuple[list[int], int | None]:
    """Take what fits in order; returns the counts, and the place of the first kind cut short."""
    counts = [0] * len(kinds)
    break_at = None
    for place, index in enumerate(order):
        kind = kinds[index]
        counts[index] = min(kind.count, capacity // kind.weight) if kind.weight else kind.count
        capacity -= counts[index] * kind.weight
        if break_at is None and counts[index] < kind.count:
            break_at = place
    return counts, break_at


def _core(kinds: Sequence[Kind], order: Sequence[int], break_at: int) -> list[int]:
    """Choose the kinds around the break."""
    if len(order) <= _CORE_KINDS:
        return list(order)
    start = min(max(break_at - _CORE_KINDS // 2, 0), len(order) - _CORE_KINDS)
    return list(order[start : start + _CORE_KINDS])


def _search(
    kinds: Sequence[Kind], core: Sequence[tuple[int, int]], capacity: int, bound: float
) -> _State:
    """Return the best choice of up to so many things of the core's kinds."""
    states: list[_State] = [(0, 0.0, None)]
    enough = bound - abs(bound) * _CLOSE_ENOUGH
    # Large things first: the small ones then fill the gaps between thinned states.
    for index, count in sorted(core, key=lambda item: -kinds[item[0]].weight):
        kind = kinds[index]
        step = 1
        while count > 0:  # 1, 2, 4, ... and the rest make every number up to the count
            number = min(step, count)
            count -= number
            step *= 2
            weight, value = kind.weight * number, kind.value * number
            more: list[_State] = [
                (before[0] + weight, before[1] + value, (index, number, before[2]))
                for before in states
                if before[0] + weight <= capacity
            ]
            states = _thin(_pareto(states, more), capacity)
        if states[-1][1] >= enough:
            break
    return states[-1]


def _pareto(first: list[_State], second: list[_State]) -> list[_State]:
    """Merge two lists and keep the states that no lighter one matches in value."""
    merged = sorted([*first, *second], key=lambda state: (state[0], -state[1]))
    kept: list[_State] = []
    best = -1.0
    for state in merged:
        if state[1] > best:
            kept.append(state)
            best = state[1]
    return kept


def _thin(states: list[_State], capacity: int) -> list[_State]:
    """Keep the lightest state, and the best one of each of ``_MAX_STATES`` ranges of weight."""
    if len(states) <= _MAX_STATES:
        return states
    width = capacity // _MAX_STATES + 1
    best = {state[0] // width: state for state in states}  # ascending: the last one is the best
    return [states[0], *(state for state in best.values() if state is not states[0])]


def _top_up(kinds: Sequence[Kind], order: Sequence[int], counts: list[int], space: int) -> None:
    for index in order:
        kind = kinds[index]
        if kind.weight:
            more = min(kind.count - counts[index], space // kind.weight)
            counts[index] += more
            space -= more * kind.weight


def _total_value(kinds: Sequence[Kind], counts: Sequence[int]) -> float:
    return sum(kind.value * count for kind, count in zip(kinds, counts, strict=True))
