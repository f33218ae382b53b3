"""What the planner chooses among: blocks in groups that are alike, and layouts of the slots.

A *layout* is a number of slots and their size. It settles which blocks can be streamed at all, so
which ones must be resident, and with them the smallest fast memory it works with. Nothing here
depends on the fast-memory budget: what is infeasible at one is judged by the same rules at another.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ...errors import InputError
from ...machine import MachineProfile, TierSpec
from ...units import SECTOR_BYTES
from ...vocabulary import Tier
from ..plan import BlockNeed, Step
from ..timeline import TimedUse
from .knapsack import Kind, fill

MAX_SLOTS = 3
"""Deeper prefetching buys nothing: one unit computes, one has arrived, one is on its way."""
_MAX_SLOT_SIZES = 12
_MAX_SLOT_SIZES_OF_MANY = 4
_MANY_GROUPS = 500
_NEVER = math.inf
NOWHERE = 2**62
"""Fast memory that a layout needs where experts have no room below."""
_FIRST = 1e6
"""How much sooner than others they get it."""


@dataclass(frozen=True, slots=True)
class Cohort:
    """Blocks alike in all that placement looks at. ``members`` are in order of first use;
    ``units``: bytes of the transfers of one full use.
    """

    need: BlockNeed
    members: tuple[str, ...]
    units: tuple[int, ...]
    full_uses: int
    lookups: int

    @property
    def count(self) -> int:
        """Number of blocks."""
        return len(self.members)

    @property
    def smallest_slot(self) -> float:
        """Bytes of the smallest slot through which a block can be streamed; infinite: none."""
        if self.need.must_reside:
            return _NEVER
        unstreamed = self.need.routed or (self.lookups and not self.full_uses)
        return 0 if unstreamed else max(self.units)

    def link_seconds(self, spec: TierSpec) -> float:
        """Return the seconds of a link that streaming one block takes in a pass."""
        seconds = 0.0
        if self.full_uses:
            seconds += self.full_uses * sum(map(spec.transfer_seconds, self.units))
        if self.lookups:
            seconds += self.lookups * spec.transfer_seconds(self.need.lookup_bytes)
        return seconds


@dataclass(frozen=True, slots=True)
class SlotLayout:
    """A number of slots and their size, and what follows for fast memory.

    ``forced``: groups (by index) that can't be streamed through these slots. ``kept``: where the
    tiers below all have a limit, the number of each group that each of them takes so that the
    least stays in fast memory; empty where one has none. ``smallest_bytes``: fast memory that this
    layout needs at least.
    """

    num_slots: int
    slot_bytes: int
    forced: frozenset[int]
    kept: tuple[tuple[int, ...], ...]
    smallest_bytes: int


class Problem:
    """Blocks, schedule and the tiers below fast memory, in the form that the search wants.

    ``schedule`` names blocks in order of use. A plain name is a full use, but for a block with
    ``lookup_bytes`` the first is the lookup; a ``Step`` says it outright. Raises InputError for
    names that are not in ``needs``, for two needs of one name, and for tiers of which the machine
    has no figures.
    """

    def __init__(
        self,
        needs: Sequence[BlockNeed],
        schedule: Sequence[str | Step],
        budget: Mapping[Tier, int | None],
        machine: MachineProfile,
        scratch_bytes: int,
        *,
        caches: bool = False,
    ) -> None:
        self.needs = {need.name: need for need in needs}
        if len(self.needs) < len(needs):
            raise InputError("two blocks have the same name: give each its own")
        for tier, capacity in budget.items():
            if tier not in machine.tiers and tier is not Tier.HBM:
                raise InputError(
                    f"the budget names {tier}, of which the machine profile has no figures: probe "
                    "it, declare it in a machine.json (machine=), or leave it out"
                )
            if capacity is not None and capacity < 0:
                raise InputError(f"budget {tier}={capacity} must be 0 bytes or more")
        self.tiers = machine.tiers
        self.cache_bytes = least_cache(needs) if caches else 0
        """What a cache for experts takes at least; all of them are below then."""
        self.scratch_bytes = scratch_bytes
        self.taken_bytes = scratch_bytes + self.cache_bytes
        """Fast memory that is spent already."""
        self.uses = read_schedule(schedule, self.needs)
        self.compute_seconds = sum(use.compute_seconds for use in self.uses)
        self.groups = form_cohorts(self.needs.values(), self.uses)
        self.slot_needs = [group.smallest_slot for group in self.groups]
        self.below = sorted(
            (
                (tier, least(size, machine.capacity_bytes.get(tier)))
                for tier, size in budget.items()
                if tier is not Tier.HBM
            ),
            key=lambda item: -machine.tiers[item[0]].bandwidth_gb_s,
        )
        """Tiers below fast memory, fastest first, with what may be put there."""

    def is_cached(self, need: BlockNeed) -> bool:
        """Say whether a block is below, and in a cache at times."""
        return self.cache_bytes > 0 and need.routed > 0

    @cached_property
    def layouts(self) -> list[SlotLayout]:
        """All layouts that are looked at: without slots, and with each number and size of them."""
        sizes = self._slot_sizes() if self.below else []
        return [
            self._layout(0, 0),
            *(self._layout(number, size) for size in sizes for number in range(1, MAX_SLOTS + 1)),
        ]

    def _layout(self, num_slots: int, slot_bytes: int) -> SlotLayout:
        forced = frozenset(
            index
            for index, smallest in enumerate(self.slot_needs)
            if not self.below or smallest > slot_bytes
        )
        kept = self._keep_below(forced)
        resident = 0
        for index, group in enumerate(self.groups):
            held = group.count - sum(counts[index] for counts in kept)
            if held and kept and self.is_cached(group.need):
                return SlotLayout(num_slots, slot_bytes, forced, kept, NOWHERE)
            if index in forced or kept:
                resident += group.need.resident_bytes * held
        smallest = self.taken_bytes + num_slots * slot_bytes + resident
        return SlotLayout(num_slots, slot_bytes, forced, kept, smallest)

    def _keep_below(self, forced: frozenset[int]) -> tuple[tuple[int, ...], ...]:
        """Fill tiers that all have a limit so that the least fast memory is needed."""
        if any(capacity is None for _, capacity in self.below):
            return ()
        left = [0 if index in forced else group.count for index, group in enumerate(self.groups)]
        kept = []
        for _, capacity in self.below:
            assert capacity is not None
            kinds = [
                Kind(
                    group.need.stored_bytes,
                    group.need.resident_bytes * (_FIRST if self.is_cached(group.need) else 1),
                    count,
                )
                for group, count in zip(self.groups, left, strict=True)
            ]
            counts = fill(kinds, capacity)
            left = [have - count for have, count in zip(left, counts, strict=True)]
            kept.append(tuple(counts))
        return tuple(kept)

    def _slot_sizes(self) -> list[int]:
        """Return the sizes worth a look, ascending: with many, the largest and some between.

        The one with which the least memory is needed is always among them.
        """
        ordered = sorted(int(size) for size in {*self.slot_needs} - {0, _NEVER})
        limit = _MAX_SLOT_SIZES if len(self.groups) < _MANY_GROUPS else _MAX_SLOT_SIZES_OF_MANY
        if len(ordered) <= limit:
            return ordered
        step = (len(ordered) - 1) / (limit - 1)
        some = {ordered[round(index * step)] for index in range(limit)}
        return sorted(some | {self._thriftiest(ordered)})

    def _thriftiest(self, sizes: Sequence[int]) -> int:
        """Return the slot size with which slot and blocks too large for it are smallest."""
        groups = sorted(
            (group for group in self.groups if group.smallest_slot < _NEVER),
            key=lambda group: group.smallest_slot,
        )
        too_large = sum(group.need.resident_bytes * group.count for group in groups)
        best, best_bytes, place = sizes[0], _NEVER, 0
        for size in sizes:
            while place < len(groups) and groups[place].smallest_slot <= size:
                too_large -= groups[place].need.resident_bytes * groups[place].count
                place += 1
            if too_large + size < best_bytes:
                best, best_bytes = size, too_large + size
        return best


def least_cache(needs: Iterable[BlockNeed]) -> int:
    """Return the bytes of the smallest cache for experts: what one token takes of a layer, and the
    largest expert, to pass others through.
    """
    layers: dict[str, list[BlockNeed]] = {}
    for need in needs:
        if need.routed:
            layers.setdefault(need.name.rpartition(".")[0], []).append(need)
    routed, largest = 0, 0
    for experts in layers.values():
        sizes = sorted((need.unit for need in experts), reverse=True)
        routed, largest = max(routed, sum(sizes[: experts[0].routed])), max(largest, sizes[0])
    return routed + largest


def most_cached(needs: Iterable[BlockNeed]) -> int:
    """Return the bytes of a cache that holds all experts."""
    return sum(need.unit for need in needs if need.routed)


def least(*limits: int | None) -> int | None:
    """Return the smallest of some limits, None if there is none."""
    return min((limit for limit in limits if limit is not None), default=None)


def pad(num_bytes: int) -> int:
    """Round up to whole sectors."""
    return -(-num_bytes // SECTOR_BYTES) * SECTOR_BYTES


def read_schedule(
    schedule: Sequence[str | Step], needs: Mapping[str, BlockNeed]
) -> tuple[TimedUse, ...]:
    """Return the uses of a pass. A lookup of rows computes nothing worth counting."""
    uses: list[TimedUse] = []
    seen: set[str] = set()
    for entry in schedule:
        name = entry if isinstance(entry, str) else entry.block
        need = needs.get(name)
        if need is None:
            raise InputError(f"the schedule names {name!r}, which is not a block of the model")
        if isinstance(entry, str):
            lookup = need.lookup_bytes > 0 and name not in seen
        else:
            lookup = entry.lookup or need.routed > 0
        if lookup and not need.lookup_bytes:
            raise InputError(f"the schedule looks {name!r} up, but its lookup_bytes are 0")
        seen.add(name)
        computes = not lookup or need.routed
        uses.append(TimedUse(name, need.compute_seconds if computes else 0.0, lookup))
    return tuple(uses)


def form_cohorts(needs: Iterable[BlockNeed], uses: Sequence[TimedUse]) -> tuple[Cohort, ...]:
    """Put blocks together that weigh and cost the same, in order of first use; unused ones last."""
    full = dict.fromkeys((use.block for use in uses), 0)
    lookups = dict(full)
    for use in uses:
        (lookups if use.lookup else full)[use.block] += 1
    place = {name: index for index, name in enumerate(full)}
    alike: dict[tuple[object, ...], list[BlockNeed]] = {}
    for need in sorted(needs, key=lambda need: place.get(need.name, len(place))):
        key = (
            need.resident_bytes,
            need.stored_bytes,
            need.unit_bytes,
            need.must_reside,
            need.lookup_bytes,
            need.routed,
            need.compute_seconds,
            full.get(need.name, 0),
            lookups.get(need.name, 0),
        )
        alike.setdefault(key, []).append(need)
    return tuple(
        Cohort(
            need=members[0],
            members=tuple(need.name for need in members),
            units=members[0].unit_bytes or (pad(members[0].stored_bytes),),
            full_uses=full.get(members[0].name, 0),
            lookups=lookups.get(members[0].name, 0),
        )
        for members in alike.values()
    )
