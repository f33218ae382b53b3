"""Which precision each block gets: least KL within a budget of bytes, or fewest bytes within a
budget of KL.

A multiple-choice knapsack: one option of each block, each with a cost (bytes, weighed by how often
a pass moves them) and a KL (nats per token). Its linear relaxation is solved by the lower convex
hull of each block's options and one sort of all hull steps by their slope (Sinha and Zoltners
1979); the slope at which the budget ends is the multiplier, the KL that a byte is worth. No
allocation beats the relaxation, so what is found is at most the gap away from the best. Where that
gap is not negligible, all options that the relaxation doesn't rule out are searched: an option of
reduced cost r (lost + multiplier * spent, above the least of its block) can't be part of anything
better than relaxation + r.

docs/veto.md tells how the ledger of the veto uses it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..vocabulary import Precision

_NEGLIGIBLE = 1e-4
"""Relative gap to the relaxation at which nothing better is looked for."""
_MAX_CORE = 64
"""Blocks whose choice is searched: those nearest to a change of it."""
_MAX_STATES = 4096
"""Partial allocations kept while searching; where more are possible, the most promising."""

_Floats = NDArray[np.float64]
_Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Option:
    """What holding a block at a precision costs, and the KL that it adds, in nats per token.

    ``cost``: bytes; where not all blocks are moved equally often, bytes times moves per token.
    """

    precision: Precision
    cost: float
    kl: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """A precision for each block.

    ``exchange_rate``: KL per unit of cost at which the budget ended; a change that costs more KL
    per byte saved is not worth it. ``gap``: how far, relatively, it may be from the best one (0:
    proved to be the best).
    """

    options: Mapping[str, Option]
    cost: float
    kl: float
    exchange_rate: float
    gap: float

    @property
    def precisions(self) -> dict[str, Precision]:
        """Block -> precision."""
        return {name: option.precision for name, option in self.options.items()}


def allocate_precisions(
    options: Mapping[str, Sequence[Option]],
    *,
    cost_budget: float | None = None,
    kl_budget: float | None = None,
) -> Allocation:
    """Choose an option of each block: the least KL within ``cost_budget``, or else the least cost
    within ``kl_budget``.

    Raises InputError for a budget that nothing fits, naming the smallest one.
    """
    assert (cost_budget is None) != (kl_budget is None), "one budget, the other one is minimised"
    if not options:
        return Allocation(options={}, cost=0.0, kl=0.0, exchange_rate=0.0, gap=0.0)
    flat = [option for choices in options.values() for option in choices]
    counts = np.array([len(choices) for choices in options.values()])
    assert counts.all(), "a block without an option"
    cost = np.array([option.cost for option in flat], dtype=np.float64)
    kl = np.array([option.kl for option in flat], dtype=np.float64)
    assert np.isfinite(cost).all() and np.isfinite(kl).all(), "options must be finite"
    block = np.repeat(np.arange(len(counts)), counts)
    if cost_budget is not None:
        problem, budget, name = _Problem(block, cost, kl), cost_budget, "cost (bytes)"
    else:
        assert kl_budget is not None
        problem, budget, name = _Problem(block, kl, cost), kl_budget, "KL (nats per token)"
    if not problem.smallest <= budget:
        raise InputError(
            f"a {name} budget of {budget:.6g} is too small: the smallest that works is "
            f"{problem.smallest!r}"
        )
    chosen, gap, slope = problem.solve(budget)
    picked = dict(zip(options, (flat[index] for index in chosen), strict=True))
    return Allocation(
        options=picked,
        cost=math.fsum(option.cost for option in picked.values()),
        kl=math.fsum(option.kl for option in picked.values()),
        exchange_rate=slope if cost_budget is not None else 1 / slope if slope else 0.0,
        gap=gap,
    )


class _Problem:
    """Minimise the sum of ``lost`` while the sum of ``spent`` stays within a budget.

    Options are flat arrays, those of a block beside each other; ``hull`` and ``steps`` index them.
    """

    def __init__(self, block: _Ints, spent: _Floats, lost: _Floats) -> None:
        self._spent, self._lost = spent, lost
        order = np.lexsort((lost, spent, block))
        self._starts = np.flatnonzero(np.diff(block, prepend=-1))
        self._ends = np.append(self._starts[1:], len(block))
        hull = _lower_hull(block, spent, lost, order)
        first = np.diff(block[hull], prepend=-1) != 0
        self.cheapest = hull[first]
        self.smallest = math.fsum(spent[self.cheapest])
        # A step goes from the hull point before it to its own.
        to = np.flatnonzero(~first)
        self._to, self._from = hull[to], hull[to - 1]
        more = spent[self._to] - spent[self._from]
        slope = (lost[self._from] - lost[self._to]) / more
        follows = np.append(False, block[self._to[1:]] == block[self._to[:-1]])
        while True:  # slopes fall along a hull, and where they are equal rounding may say otherwise
            steeper = np.flatnonzero(follows[1:] & (slope[1:] > slope[:-1])) + 1
            if not len(steeper):
                break
            slope[steeper] = slope[steeper - 1]
        ordered = np.argsort(-slope, kind="stable")
        self._to, self._from = self._to[ordered], self._from[ordered]
        self._more, self._slope = more[ordered], slope[ordered]
        self._block = block

    def solve(self, budget: float) -> tuple[_Ints, float, float]:
        """Return an option of each block, the relative gap to the best, and the slope at the
        budget.
        """
        limit = budget
        while True:
            chosen, gap, slope = self._solve(max(limit, self.smallest))
            excess = math.fsum(self._spent[chosen]) - budget
            if excess <= 0:
                return chosen, gap, slope
            limit -= 2 * excess  # sums of floats are rounded: the budget is kept all the same

    def _solve(self, budget: float) -> tuple[_Ints, float, float]:
        chosen = self.cheapest.copy()
        left = budget - self.smallest
        within = np.cumsum(self._more) <= left
        cut = len(within) if within.all() else int(np.argmin(within))
        chosen[self._block[self._to[:cut]]] = self._to[:cut]
        if cut == len(within):
            return chosen, 0.0, float(self._slope[-1]) if cut else 0.0
        slope = float(self._slope[cut])
        left -= float(self._more[:cut].sum())
        bound = math.fsum(self._lost[chosen]) - slope * left
        relaxed = chosen.copy()
        self._fill(chosen, cut, left)
        found = math.fsum(self._lost[chosen])
        if found - bound <= _NEGLIGIBLE * found:
            return chosen, _relative(found, bound), slope
        better, proved = self._search(relaxed, budget, slope, found - bound)
        if better is not None and math.fsum(self._lost[better]) < found:
            chosen, found = better, math.fsum(self._lost[better])
        return chosen, 0.0 if proved else _relative(found, bound), slope

    def _fill(self, chosen: _Ints, cut: int, left: float) -> None:
        """Spend what is left on the steps after the cut that still fit, steepest first."""
        for step in np.flatnonzero(self._more[cut:] <= left) + cut:
            index = self._block[self._to[step]]
            if chosen[index] == self._from[step] and self._more[step] <= left:
                chosen[index] = self._to[step]
                left -= float(self._more[step])

    def _search(
        self, base: _Ints, budget: float, slope: float, slack: float
    ) -> tuple[_Ints | None, bool]:
        """Look for what loses at most ``slack`` more than the relaxation; returns the best of it,
        and whether nothing can be better.

        ``base`` is what the relaxation takes; blocks outside the core keep that.
        """
        priced = self._lost + slope * self._spent
        reduced = priced - np.repeat(priced[base], self._ends - self._starts)
        slack *= 1 + 1e-9  # rounding may not rule out what is as good
        other = reduced.copy()
        other[base] = np.inf
        nearest = np.minimum.reduceat(other, self._starts)
        core = np.flatnonzero(nearest <= slack)
        proved = len(core) <= _MAX_CORE
        core = core[np.argsort(nearest[core], kind="stable")[:_MAX_CORE]]
        fixed = np.delete(base, core)
        least = np.minimum.reduceat(self._spent, self._starts)[core]
        rest = np.append(np.cumsum(least[::-1])[::-1][1:], 0.0)
        spent = np.array([math.fsum(self._spent[fixed])])
        loosely = budget * (1 + 1e-12)  # what is chosen in the end is added up exactly
        lost, owed = np.zeros(1), np.zeros(1)
        trails: list[tuple[_Ints, _Ints]] = []
        for index, still_needed in zip(core, rest, strict=True):
            start, end = self._starts[index], self._ends[index]
            usable = np.flatnonzero(reduced[start:end] <= slack) + start
            now_owed = (owed[:, None] + reduced[usable]).ravel()
            now_spent = (spent[:, None] + self._spent[usable]).ravel()
            now_lost = (lost[:, None] + self._lost[usable]).ravel()
            keep = np.flatnonzero((now_owed <= slack) & (now_spent + still_needed <= loosely))
            order = keep[np.lexsort((now_lost[keep], now_spent[keep]))]
            before = np.minimum.accumulate(np.append(np.inf, now_lost[order]))[:-1]
            order = order[now_lost[order] < before]
            if len(order) > _MAX_STATES:
                proved = False
                order = order[np.sort(np.argsort(now_owed[order], kind="stable")[:_MAX_STATES])]
            if not len(order):
                return None, proved
            spent, lost, owed = now_spent[order], now_lost[order], now_owed[order]
            trails.append((order // len(usable), usable[order % len(usable)]))
        for end_place in np.argsort(lost, kind="stable"):
            chosen, place = base.copy(), end_place
            for index, (parents, picks) in zip(core[::-1], reversed(trails), strict=True):
                chosen[index], place = picks[place], parents[place]
            if math.fsum(self._spent[chosen]) <= budget:
                return chosen, proved
        return None, proved


def _lower_hull(block: _Ints, spent: _Floats, lost: _Floats, order: _Ints) -> _Ints:
    """Return the options on the falling part of each block's lower convex hull, in order of
    ``spent``.

    ``order`` sorts the options by block, then spent, then lost.
    """
    hull = order
    while True:  # a point not below an earlier one of its block, or above its neighbours' segment
        x, y, owner = spent[hull], lost[hull], block[hull]
        follows = np.append(False, owner[1:] == owner[:-1])
        keep = ~follows | (np.append(np.inf, y[:-1]) > y)
        inner = follows & np.append(follows[1:], False) & keep
        middle = np.flatnonzero(inner)
        left, right = middle - 1, middle + 1
        falls = y[right] < y[middle]
        chord = (y[right] - y[left]) * (x[middle] - x[left])
        keep[middle[falls & ((y[middle] - y[left]) * (x[right] - x[left]) > chord)]] = False
        if keep.all():
            return hull
        hull = hull[keep]


def _relative(found: float, bound: float) -> float:
    return max(found - bound, 0.0) / found if found else 0.0
