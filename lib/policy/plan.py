"""What a plan is made from and what it says: needs of blocks, placements, and the predicted pass.

``planner.make_plan`` makes one. Bytes are counted as they are held: ``resident_bytes`` in fast
memory, ``stored_bytes`` in a tier below.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..units import SECTOR_BYTES
from ..vocabulary import Precision, State, Tier
from .timeline import PassTime


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockNeed:
    """What a block asks for, at the precision it is to have.

    ``resident_bytes``: fast memory if it stays there; ``stored_bytes``: its payload below.
    ``unit_bytes``: the transfers that its payload is cut into, in whole sectors; empty: one.
    ``must_reside``: it may not leave fast memory.
    ``uses``: uses in a pass before one was traced. ``lookup_bytes``: what a use moves that takes
    rows of an embedding only; 0: it has no such use. ``compute_seconds``: of one full use.
    ``computed_as_is``: of a precision below the model's own, multiplied with without expansion.
    ``routed``: an expert, one of which a token takes so many in its layer, and which is known only
    then; where not all blocks fit the experts are below, and come into a cache. 0: none.
    """

    name: str
    kind: str
    layer: int | None
    precision: Precision
    resident_bytes: int
    stored_bytes: int
    unit_bytes: tuple[int, ...] = ()
    must_reside: bool = False
    uses: int = 1
    lookup_bytes: int = 0
    importance: float | None = None
    compute_seconds: float = 0.0
    computed_as_is: bool = False
    routed: int = 0

    @property
    def unit(self) -> int:
        """Bytes of its payload as one transfer, in whole sectors."""
        return -(-self.stored_bytes // SECTOR_BYTES) * SECTOR_BYTES


@dataclass(frozen=True, slots=True)
class Step:
    """One use in a schedule. ``lookup``: it takes rows of an embedding, and computes nothing."""

    block: str
    lookup: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a block is kept, and why.

    ``resident_bytes``: the fast memory it holds, 0 below; ``stored_bytes``: its payload.
    ``unit_bytes``: the transfers of a full use, empty where it is resident or only looked up.
    """

    tier: Tier
    precision: Precision
    state: State
    reason: str
    resident_bytes: int
    stored_bytes: int
    unit_bytes: tuple[int, ...] = ()

    @property
    def held_bytes(self) -> int:
        """What it takes of its tier."""
        return self.resident_bytes if self.tier is Tier.HBM else self.stored_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Every block's place. Fast memory holds resident blocks, slots, a cache and scratch."""

    placements: Mapping[str, Placement]
    slot_bytes: int
    num_slots: int
    scratch_bytes: int
    budget: Mapping[Tier, int | None]
    predicted: PassTime
    original_bytes: int = 0
    """What the originals of compressed weights take on the SSD, within its budget."""
    expanded_bytes: int = 0
    """The share of ``scratch_bytes`` that is taken only for as long as weights are expanded."""
    cache_bytes: int = 0
    """What the cache for experts that are below takes of fast memory."""
    hint_tiers: Mapping[str, Tier] = field(default_factory=dict)
    """In a plan by hints what each block's hint says, by the blocks' own names: what is reported.
    Where they are is in ``placements``.
    """

    @property
    def fast_bytes(self) -> int:
        """Fast memory in use, never above the budget."""
        resident = sum(placement.resident_bytes for placement in self.placements.values())
        slots = self.num_slots * self.slot_bytes
        return resident + slots + self.scratch_bytes + self.cache_bytes

    def limit(self, tier: Tier) -> int | None:
        """Return the bytes that a tier may hold. None: no limit; 0: the budget doesn't name it."""
        return self.budget.get(tier, 0) if self.budget else None

    def bytes_per_tier(self) -> dict[Tier, int]:
        """Return bytes of weights per tier that holds any, nearest first: as held there."""
        sums = dict.fromkeys(Tier, 0)
        for placement in self.placements.values():
            sums[placement.tier] += placement.held_bytes
        return {tier: num_bytes for tier, num_bytes in sums.items() if num_bytes}

    def to_json(self) -> dict[str, Any]:
        """Return the plan as a document."""
        return {
            "budget": {str(tier): num_bytes for tier, num_bytes in self.budget.items()},
            "fast_bytes": self.fast_bytes,
            "num_slots": self.num_slots,
            "slot_bytes": self.slot_bytes,
            "scratch_bytes": self.scratch_bytes,
            "cache_bytes": self.cache_bytes,
            "original_bytes": self.original_bytes,
            "bytes_per_tier": {str(tier): size for tier, size in self.bytes_per_tier().items()},
            "predicted": {
                "seconds": self.predicted.seconds,
                "compute_seconds": self.predicted.compute_seconds,
                "link_seconds": self.predicted.link_seconds,
                "wait_seconds": self.predicted.wait_seconds,
                "moved_bytes": self.predicted.moved_bytes,
            },
            "placements": {
                name: {
                    "tier": str(placement.tier),
                    "precision": str(placement.precision),
                    "state": str(placement.state),
                    "resident_bytes": placement.resident_bytes,
                    "stored_bytes": placement.stored_bytes,
                    "unit_bytes": list(placement.unit_bytes),
                    "reason": placement.reason,
                }
                for name, placement in self.placements.items()
            },
        }


def definition_schedule(needs: Iterable[BlockNeed]) -> tuple[Step, ...]:
    """Return the order to expect before a pass was traced: that of definition.

    An embedding that is used again (a tied head) is looked up first and used in full at the end;
    any other block that is used several times follows itself.
    """
    steps: list[Step] = []
    last: list[Step] = []
    for need in needs:
        if need.lookup_bytes:
            steps.append(Step(need.name, lookup=True))
            last += [Step(need.name)] * (need.uses - 1)
        else:
            steps += [Step(need.name)] * need.uses
    return (*steps, *last)


def replace_uses(
    schedule: Iterable[Step], uses: Iterable[Step], traced: Collection[str]
) -> tuple[Step, ...]:
    """Return a schedule with other uses of the blocks that are ``traced``, in the places that such
    blocks have in it; those that are more than these come last.
    """
    coming, steps = iter(uses), []
    for step in schedule:
        if step.block not in traced:
            steps.append(step)
        elif (use := next(coming, None)) is not None:
            steps.append(use)
    return (*steps, *coming)
