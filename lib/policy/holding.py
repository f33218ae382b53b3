"""What is held where, and which blocks should be the next to leave fast memory, or to come.

Blocks of equal worth and size are alike: some of them are chosen at even distances over the pass,
since the link works while resident blocks compute (``planner.spread``); of several such choices the
one with the least importance leaves.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..vocabulary import Tier
from .events import BlockFacts, Facts, Held
from .planner.knapsack import Kind, fill
from .planner.spread import pick_evenly
from .score import Terms, score

_SLOTS = 2
"""Where streaming begins: one computes, one is on its way."""
_UNUSED_WORTH = 1e-18
"""Seconds per byte of a block that no pass uses: less than any other's, and more than nothing."""
_PHASES = (0.5, 0.25, 0.75)


@dataclass(frozen=True, slots=True)
class Demotion:
    """Blocks that leave for tiers below, and the slots through which streams what is then away."""

    places: tuple[tuple[str, Tier], ...]
    num_slots: int
    slot_bytes: int


class Holding:
    """The place of each block, and the slots beside them."""

    def __init__(self) -> None:
        self.blocks: dict[str, BlockFacts] = {}
        self.tiers: dict[str, Tier] = {}
        self.num_slots, self.slot_bytes = 0, 0
        self._below: tuple[tuple[Tier, int | None], ...] = ()
        self._scratch_bytes, self._cache_bytes = 0, 0
        self.replans = False
        """Only the planner makes another plan."""

    def take_facts(self, facts: Facts) -> None:
        """Learn what there is to hold."""
        self.blocks = {each.name: each for each in facts.blocks}
        self.tiers = {name: tier for name, tier in self.tiers.items() if name in self.blocks}
        self._below, self._scratch_bytes = facts.below, facts.scratch_bytes
        self.replans = facts.replans

    def take_held(self, held: Held) -> list[str]:
        """Learn what is held; returns the blocks whose places have changed."""
        tiers = dict(zip(self.blocks, held.tiers, strict=True))
        changed = [name for name, tier in tiers.items() if self.tiers.get(name, tier) is not tier]
        self.tiers = tiers
        self.num_slots, self.slot_bytes = held.num_slots, held.slot_bytes
        self._cache_bytes = held.cache_bytes
        return changed

    @property
    def fast_bytes(self) -> int:
        """Fast memory that is taken: residents, slots, a cache and scratch."""
        resident = sum(facts.resident_bytes for facts in self._residents())
        return resident + self.slots_bytes + self._scratch_bytes + self._cache_bytes

    @property
    def away(self) -> list[BlockFacts]:
        """The blocks that aren't in fast memory, in order."""
        return [self.blocks[name] for name, tier in self.tiers.items() if tier is not Tier.HBM]

    def has_room(self, target: int | None, least: int) -> bool:
        """Say whether something that is away may come within ``target`` bytes (None: no limit)."""
        away = self.away
        if target is None or not away:
            return bool(away)
        room = target - self.fast_bytes
        sizes = [facts.resident_bytes for facts in away]
        return room >= max(least, min(sizes)) or sum(sizes) <= room + self.slots_bytes

    @property
    def slots_bytes(self) -> int:
        """What all slots take."""
        return self.num_slots * self.slot_bytes

    def slots_for(self, away: Sequence[BlockFacts], num_slots: int) -> tuple[int, int]:
        """Return number and size of the slots through which blocks stream; 0 where none does."""
        slot_bytes = max((facts.slot_bytes for facts in away), default=0)
        return (num_slots, slot_bytes) if slot_bytes else (0, 0)

    def demote(self, limit: int, pressure: float) -> Demotion | None:
        """Choose what leaves until no more than ``limit`` is taken: the least worth, and no more
        than needed. None: leaving is not enough.
        """
        for num_slots in (self.num_slots or _SLOTS, 1):
            demoted = self._choose_demoted(limit, num_slots, pressure)
            places = None if demoted is None else self._find_places(demoted)
            if demoted is not None and places is not None:
                return Demotion(places, *self.slots_for((*self.away, *demoted), num_slots))
        return None

    def promote(
        self, room: int | None, step: int, least: int, may: Sequence[BlockFacts], pressure: float
    ) -> list[BlockFacts]:
        """Choose what comes into ``room`` bytes (None: any), what is worth most first.

        ``step``: no more bytes than this, but for one block that is larger. ``least``: nothing
        comes into less room than this, unless all does. ``may``: those that are allowed to.
        """
        everything = sum(facts.resident_bytes for facts in may)
        freed = self.slots_bytes if len(may) == len(self.away) else 0
        all_fit = room is None or everything <= room + freed
        if room is not None and room < least and not all_fit:
            return []
        promoted: list[BlockFacts] = []
        ranked = [facts for alike in reversed(_alike(may, pressure)) for facts in alike]
        for facts in ranked:
            size = facts.resident_bytes
            if (room is None or size <= room) and (size <= step or not promoted):
                promoted.append(facts)
                step, everything = step - size, everything - size
                room = None if room is None else room - size
        # What is left may need the memory of the slots, and comes as a whole then.
        return ranked if all_fit and (not promoted or everything <= step) else promoted

    def _residents(self) -> list[BlockFacts]:
        return [self.blocks[name] for name, tier in self.tiers.items() if tier is Tier.HBM]

    def _choose_demoted(
        self, limit: int, num_slots: int, pressure: float
    ) -> list[BlockFacts] | None:
        """Return the residents whose leaving costs the least seconds and is enough, or None.

        For each size of the slots, what may leave through them and stays is a knapsack.
        """
        residents = self._residents()
        alike = _alike([facts for facts in residents if not facts.must_reside], pressure)
        fixed = self._scratch_bytes
        fixed += sum(facts.resident_bytes for facts in residents if facts.must_reside)
        least = max((facts.slot_bytes for facts in self.away), default=0)
        best: tuple[float, list[BlockFacts]] | None = None
        for slot in sorted({least, *(group[0].slot_bytes for group in alike)}):
            stuck = [group for group in alike if group[0].slot_bytes > slot]
            kept = sum(facts.resident_bytes for group in stuck for facts in group)
            space = limit - fixed - kept - num_slots * slot
            if slot < least or space < 0:
                continue
            may = [group for group in alike if group[0].slot_bytes <= slot]
            values = [max(_worth(group[0], pressure), _UNUSED_WORTH) for group in may]
            sizes = [group[0].resident_bytes for group in may]
            counts = fill(
                [
                    Kind(size, value * size, len(group))
                    for size, value, group in zip(sizes, values, may, strict=True)
                ],
                space,
            )
            lost, demoted = 0.0, list[BlockFacts]()
            for group, count, value in zip(may, counts, values, strict=True):
                leaving = len(group) - count
                lost += leaving * value * group[0].resident_bytes
                demoted += _pick(group, leaving) if leaving else []
            if best is None or lost < best[0]:
                best = lost, demoted
        return None if best is None else best[1]

    def _find_places(self, demoted: Sequence[BlockFacts]) -> tuple[tuple[str, Tier], ...] | None:
        """Return the tier below for each block, the fastest with room; None: there is none."""
        used = {tier: 0 for tier, _ in self._below}
        for name, tier in self.tiers.items():
            if tier in used:
                used[tier] += self.blocks[name].stored_bytes
        places: list[tuple[str, Tier]] = []
        for facts in demoted:
            for tier, limit in self._below:
                if limit is None or used[tier] + facts.stored_bytes <= limit:
                    used[tier] += facts.stored_bytes
                    places.append((facts.name, tier))
                    break
            else:
                return None
        return tuple(places)


def _alike(blocks: Sequence[BlockFacts], pressure: float) -> list[list[BlockFacts]]:
    """Put blocks of equal worth and size together, the least worth first; each in the order of a
    pass.
    """
    groups: dict[tuple[float, int, int], list[BlockFacts]] = {}
    for facts in blocks:
        key = _worth(facts, pressure), facts.resident_bytes, facts.slot_bytes
        groups.setdefault(key, []).append(facts)
    for group in groups.values():
        group.sort(key=lambda facts: facts.places)
    return [groups[key] for key in sorted(groups)]


def _worth(facts: BlockFacts, pressure: float) -> float:
    """Return what residence saves, in seconds per byte and pass."""
    return score(
        Terms(
            num_bytes=facts.resident_bytes,
            transfer_seconds=facts.transfer_seconds,
            pressure=pressure,
        )
    )


def _pick(alike: Sequence[BlockFacts], count: int) -> list[BlockFacts]:
    """Choose so many at even distances."""
    choices = [pick_evenly(len(alike), count, phase) for phase in _PHASES]
    best = min(choices, key=lambda choice: sum(alike[index].importance for index in choice))
    return [alike[index] for index in best]
