"""The planner's search: layouts of slots, a knapsack for each, even spreading, and a last polish.

For each layout of slots the rest of the fast memory is a knapsack of seconds saved per byte; blocks
of equal value are streamed at even distances, which keeps the link busy; the tiers below are filled
in the same way, fastest first. Each choice is played through on the timeline, and single swaps
improve the best ones where there is time for it. The shortest predicted pass wins.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ...machine import TierSpec
from ...vocabulary import Tier
from ..timeline import PassTime, Transfer, simulate
from .knapsack import Kind, fill, fractional_value, sort_by_density
from .polish import exchanges
from .problem import Problem, SlotLayout
from .spread import phases, pick_evenly

_FAVOUR = 10.0
_MAX_FAVOURED = 6
"""Groups that are tried as first choice for fast memory, whatever they save. Seconds of the link
are not all that counts where compute hides most of them: how they lie in the schedule does too.
"""
_VARIANTS = 3
_SEARCH_STEPS = 100_000
_POLISH_STEPS = 80_000
"""Uses played through in the search, and in polishing: half a second each at most."""
_POLISHED = 4
_MIN_EXCHANGES = 10
"""Layouts whose best choice is polished, if there are steps for some exchanges in each."""
_GOOD_ENOUGH = 1.003
"""Ratio to the lower bound from which nothing is polished."""
_LINK_COST, _SINGLE_SLOT_COST = 0.02, 0.05
"""Seconds that are added per second of the link. With one slot nothing is on its way while a unit
is waited for or checked, so that its link is never as fast as the probe's.
"""
_TIE = 1e-4
"""Costs that differ by less than this share are treated as equal."""
_UNUSED_VALUE = 1e-9
"""Value of a block that no pass was seen to use, as a share of one use of it."""

_Counts = tuple[tuple[int, ...], ...]
"""How many of each group are in HBM, and in each tier below, in order."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A tier for each block, and what comes of it. ``fast_bytes`` are without scratch."""

    layout: SlotLayout
    tiers: Mapping[str, Tier]
    predicted: PassTime
    fast_bytes: int
    importance: float

    @property
    def cost(self) -> float:
        """Predicted seconds, and a little for each second of the link: what jitter may claim."""
        share = _SINGLE_SLOT_COST if self.layout.num_slots == 1 else _LINK_COST
        return self.predicted.seconds + share * self.predicted.link_seconds

    def beats(self, other: "Choice") -> bool:
        """Say whether this costs less, or as much with more importance resident, or is smaller, or
        has fewer slots: a block alone in one never leaves it, and resides as well.
        """
        if abs(self.cost - other.cost) > _TIE * other.cost:
            return self.cost < other.cost
        return self._merits > other._merits

    @property
    def _merits(self) -> tuple[float, int, int]:
        return self.importance, -self.fast_bytes, -self.layout.num_slots


class Search:
    """Looks for the choice with the shortest predicted pass in ``fast`` bytes of HBM."""

    def __init__(self, problem: Problem, fast: int) -> None:
        self._problem = problem
        self._fast = fast
        self._marginal = self._marginal_tier()
        self._steps = 0
        self._saved = [self._values(single=False), self._values(single=True)]
        resident = [group.need.resident_bytes for group in problem.groups]
        self._orders = [
            sort_by_density([Kind(*kind, 1) for kind in zip(resident, saved, strict=True)])
            for saved in self._saved
        ]
        sizes = [group.need.stored_bytes * group.count for group in problem.groups]
        by_size = sorted(range(len(sizes)), key=lambda index: -sizes[index])
        self._favoured = by_size[:_MAX_FAVOURED] if len(sizes) > 1 else []
        self._group_of = {name: group for group in problem.groups for name in group.members}

    def best(self, layouts: Sequence[SlotLayout]) -> Choice:
        """Try layouts, the most promising first, until the bounds of the rest are worse."""
        bounds = {id(layout): self._bound(layout) for layout in layouts}
        order = sorted(
            layouts,
            key=lambda layout: (bounds[id(layout)], layout.num_slots, layout.slot_bytes),
        )
        exact = len(self._problem.below) <= 1
        found: list[Choice] = []
        for layout in order:
            least = min((choice.cost for choice in found), default=math.inf)
            if found and (self._steps > _SEARCH_STEPS or (exact and bounds[id(layout)] >= least)):
                break
            found.append(_best(self._choices(layout)))
        found.sort(key=lambda choice: choice.cost)
        best = _best(iter(found))
        steps = _POLISH_STEPS // _POLISHED
        worthwhile = steps >= _MIN_EXCHANGES * len(self._problem.uses)
        for choice in found[: _POLISHED if worthwhile else 0]:
            if best.cost > bounds[id(order[0])] * _GOOD_ENOUGH:
                best = _best(iter([best, self._polish(choice, steps)]))
        return best

    def _marginal_tier(self) -> TierSpec | None:
        """Return the tier that the last streamed byte goes to: what a resident byte saves."""
        problem = self._problem
        left = sum(group.need.stored_bytes * group.count for group in problem.groups) - self._fast
        for tier, capacity in problem.below:
            if capacity is None or left <= capacity:
                return problem.tiers[tier]
            left -= capacity
        return problem.tiers[problem.below[-1][0]] if problem.below else None

    def _kinds(self, layout: SlotLayout, favoured: int | None = None) -> list[Kind]:
        """Return what may be resident beyond what must be, with the seconds that it saves."""
        values = self._saved[layout.num_slots == 1]
        kinds = []
        for index, group in enumerate(self._problem.groups):
            count, value = group.count, values[index]
            if layout.kept:
                count = sum(counts[index] for counts in layout.kept)
            if index in layout.forced or self._problem.is_cached(group.need):
                count = 0
            if index == favoured:
                value *= _FAVOUR
            kinds.append(Kind(group.need.resident_bytes, value, count))
        return kinds

    def _values(self, *, single: bool) -> list[float]:
        """Return the seconds that a resident block of each group saves; ``single``: of one slot."""
        spec = self._marginal
        if spec is None:
            return [0.0] * len(self._problem.groups)
        values = []
        for group in self._problem.groups:
            value = group.link_seconds(spec)
            if single:  # nothing is read while a streamed block computes
                value += group.full_uses * group.need.compute_seconds
            values.append(value or _UNUSED_VALUE * spec.transfer_seconds(group.need.stored_bytes))
        return values

    def _bound(self, layout: SlotLayout) -> float:
        """Return a cost that no choice of this layout can beat, where there is one tier below."""
        if self._marginal is None:
            return self._problem.compute_seconds
        single = layout.num_slots == 1
        kinds = self._kinds(layout)
        streamed = sum(kind.value * kind.count for kind in kinds)
        space = self._fast - layout.smallest_bytes
        link = streamed - fractional_value(kinds, self._orders[single], space)
        return max(self._problem.compute_seconds, link * (1 if single else 1 + _LINK_COST))

    def _choices(self, layout: SlotLayout) -> Iterator[Choice]:
        """Play through the choices of one layout; at least one."""
        tried: set[_Counts] = set()
        for favoured in (None, *self._favoured):
            counts = self._count(layout, favoured)
            if counts in tried:
                continue
            tried.add(counts)
            whole = all(
                group.count == 1 or max(in_tier[index] for in_tier in counts) == group.count
                for index, group in enumerate(self._problem.groups)
            )
            for variant in range(1 if whole else _VARIANTS):
                yield self._play(layout, self._spread(counts, variant))
                if self._steps > _SEARCH_STEPS:
                    return

    def _count(self, layout: SlotLayout, favoured: int | None) -> _Counts:
        """Decide how many blocks of each group go where."""
        groups = self._problem.groups
        if self._marginal is None:
            return (tuple(group.count for group in groups),)
        kinds = self._kinds(layout, favoured)
        chosen = fill(kinds, self._fast - layout.smallest_bytes)
        left = [kind.count - count for kind, count in zip(kinds, chosen, strict=True)]
        for index, group in enumerate(groups):
            if self._problem.is_cached(group.need):
                left[index] = group.count
        fast = tuple(group.count - count for group, count in zip(groups, left, strict=True))
        below: list[tuple[int, ...]] = []
        for tier, capacity in self._problem.below:
            counts = left if capacity is None else self._fill_tier(tier, capacity, left)
            left = [have - count for have, count in zip(left, counts, strict=True)]
            below.append(tuple(counts))
        if any(left):  # only what keeps fast memory smallest is known to fit
            below = _take_out(layout.kept, chosen)
        return (fast, *below)

    def _fill_tier(self, tier: Tier, capacity: int, left: Sequence[int]) -> list[int]:
        """Choose what saves most time by being in this tier and not in the last one."""
        assert self._marginal is not None
        spec = self._problem.tiers[tier]
        kinds = []
        for group, count in zip(self._problem.groups, left, strict=True):
            saved = group.link_seconds(self._marginal) - group.link_seconds(spec)
            # Where nothing is saved the tier is used all the same: the next one may be full.
            unused = _UNUSED_VALUE * spec.transfer_seconds(group.need.stored_bytes)
            kinds.append(Kind(group.need.stored_bytes, max(saved, unused), count))
        return fill(kinds, capacity)

    def _spread(self, counts: _Counts, variant: int) -> dict[str, Tier]:
        """Choose the members of each group that go to each tier, the lower ones evenly spread."""
        groups = self._problem.groups
        order = [Tier.HBM, *(tier for tier, _ in self._problem.below)]
        tiers: dict[str, Tier] = {}
        for index, phase in enumerate(phases(len(groups), variant)):
            members: Sequence[str] = groups[index].members
            for tier, in_tier in zip(order, counts, strict=True):
                tiers |= dict.fromkeys(members, tier)
                further = len(members) - in_tier[index]
                members = [members[place] for place in pick_evenly(len(members), further, phase)]
        return tiers

    def _play(self, layout: SlotLayout, tiers: Mapping[str, Tier]) -> Choice:
        """Simulate a choice."""
        problem = self._problem
        transfers: dict[str, Transfer] = {}
        made: dict[tuple[int, Tier], Transfer] = {}
        importance, fast_bytes = 0.0, layout.num_slots * layout.slot_bytes
        for name, tier in tiers.items():
            group = self._group_of[name]
            if tier is Tier.HBM:
                fast_bytes += group.need.resident_bytes
                importance += problem.needs[name].importance or 0.0
                continue
            key = (id(group), tier)
            if key not in made:
                made[key] = Transfer(tier, group.units, group.need.lookup_bytes)
            transfers[name] = made[key]
        self._steps += len(problem.uses)
        predicted = simulate(problem.uses, transfers, problem.tiers, layout.num_slots)
        return Choice(layout, tiers, predicted, fast_bytes, importance)

    def _polish(self, choice: Choice, max_steps: int) -> Choice:
        """Exchange a few resident and streamed blocks, as long as it helps."""
        end = self._steps + max_steps - len(self._problem.uses)
        improved = True
        while improved:
            improved = False
            space = self._fast - self._problem.taken_bytes - choice.fast_bytes
            for tiers in exchanges(self._problem, choice.tiers, choice.layout.slot_bytes, space):
                if self._steps > end:
                    return choice
                other = self._play(choice.layout, tiers)
                if other.cost < choice.cost * (1 - _TIE):
                    choice, improved = other, True
                    break
        return choice


def _best(choices: Iterator[Choice]) -> Choice:
    best = next(choices)
    for choice in choices:
        if choice.beats(best):
            best = choice
    return best


def _take_out(kept: _Counts, promoted: Sequence[int]) -> list[tuple[int, ...]]:
    """Take what became resident out of the tiers of a layout, slowest first."""
    rest = list(promoted)
    below: list[tuple[int, ...]] = []
    for in_tier in reversed(kept):
        taken = [min(have, want) for have, want in zip(in_tier, rest, strict=True)]
        rest = [want - take for want, take in zip(rest, taken, strict=True)]
        below.append(tuple(have - take for have, take in zip(in_tier, taken, strict=True)))
    return below[::-1]
