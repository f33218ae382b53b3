"""What a pass over a model costs when blocks are streamed: transfers, slots and compute in time.

Pure arithmetic, no device and no wall clock. The rules are those of the transfer engine:

- A *unit* is what one transfer moves: a block, or a shard of its rows. Units are read into
  ``num_slots`` slots, in the order of their next use, over the end of a pass into the next one
  (the order is cyclic). One is asked for as soon as a slot is free; one that is still in its slot
  is not read again, and the slot that is given away is that of the unit used last.
- Each tier has one link, first come first served: a transfer ends at
  max(asked for, link free) + setup + bytes / bandwidth.
- Compute waits for the unit it needs and frees the slot when it ends. A block of several units
  computes with one after another, each for a share of the time in proportion to its bytes.
- A lookup takes rows of an embedding that are known only when it happens: nothing is prefetched,
  no slot is taken, and its transfer waits behind those asked for before.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..machine import TierSpec
from ..vocabulary import Tier


@dataclass(frozen=True, slots=True)
class TimedUse:
    """One use of a block in a pass. ``lookup``: it takes a few rows of an embedding, no more."""

    block: str
    compute_seconds: float
    lookup: bool = False


@dataclass(frozen=True, slots=True)
class Transfer:
    """What one use of a streamed block moves: its units in order, or ``lookup_bytes``."""

    tier: Tier
    unit_bytes: tuple[int, ...]
    lookup_bytes: int = 0


@dataclass(frozen=True, slots=True)
class PassTime:
    """One pass in steady state.

    ``link_seconds``: of the busiest link, setup times included; ``wait_seconds``: compute stood
    still; ``moved_bytes``: over all links.
    """

    seconds: float
    link_seconds: float
    wait_seconds: float
    moved_bytes: int

    @property
    def compute_seconds(self) -> float:
        """Seconds without waiting."""
        return self.seconds - self.wait_seconds


class Timeline:
    """A clock, and a queue of transfers for each tier's link."""

    def __init__(self, tiers: Mapping[Tier, TierSpec]) -> None:
        self._tiers = tiers
        self._free_at: dict[Tier, float] = {}
        self.now = 0.0
        self.wait_seconds = 0.0
        self.moved_bytes = 0
        self.link_seconds: dict[Tier, float] = {}

    def request(self, tier: Tier, num_bytes: int) -> float:
        """Put a transfer in the tier's queue; returns when it ends."""
        seconds = self._tiers[tier].transfer_seconds(num_bytes)
        done = max(self._free_at.get(tier, 0.0), self.now) + seconds
        self._free_at[tier] = done
        self.link_seconds[tier] = self.link_seconds.get(tier, 0.0) + seconds
        self.moved_bytes += num_bytes
        return done

    def wait(self, moment: float) -> None:
        """Let the time pass until a moment, if it is still to come."""
        if moment > self.now:
            self.wait_seconds += moment - self.now
            self.now = moment

    def compute(self, seconds: float) -> None:
        """Let the time pass in which the model computes."""
        self.now += seconds


def simulate(
    uses: Sequence[TimedUse],
    transfers: Mapping[str, Transfer],
    tiers: Mapping[Tier, TierSpec],
    num_slots: int,
    passes: int = 3,
) -> PassTime:
    """Return what a pass takes in the long run: the last of ``passes``, the first of which starts
    with empty slots.

    ``transfers`` holds the streamed blocks; blocks that are not in it are resident. ``num_slots``
    may be 0 where nothing but lookups is streamed.
    """
    steps, units = _compile(uses, transfers)
    assert num_slots > 0 or not units, "streamed units need a slot"
    timeline = Timeline(tiers)
    ring = _Ring(units, num_slots, timeline.request)
    start, waited, moved, links = 0.0, 0.0, 0, dict[Tier, float]()
    for _ in range(passes):
        start, waited, moved = timeline.now, timeline.wait_seconds, timeline.moved_bytes
        links = dict(timeline.link_seconds)
        for seconds, tier, lookup_bytes in steps:
            if tier is None:
                timeline.compute(seconds)
            elif lookup_bytes:
                timeline.wait(timeline.request(tier, lookup_bytes))
                timeline.compute(seconds)
            else:
                timeline.wait(ring.next_done())
                timeline.compute(seconds)
                ring.release()
    return PassTime(
        seconds=timeline.now - start,
        link_seconds=max(
            (busy - links.get(tier, 0.0) for tier, busy in timeline.link_seconds.items()),
            default=0.0,
        ),
        wait_seconds=timeline.wait_seconds - waited,
        moved_bytes=timeline.moved_bytes - moved,
    )


_Unit = tuple[str, int, Tier, int]
"""Block, index in the block, tier, bytes."""
_Step = tuple[float, Tier | None, int]
"""Compute seconds; the tier it waits for, if any; bytes of a lookup, or 0 for the next unit."""


def _compile(
    uses: Sequence[TimedUse], transfers: Mapping[str, Transfer]
) -> tuple[list[_Step], list[_Unit]]:
    """Return a pass as steps, with resident stretches put together, and its units in order."""
    steps: list[_Step] = []
    units: list[_Unit] = []
    resident = 0.0
    for use in uses:
        transfer = transfers.get(use.block)
        if transfer is None:
            resident += use.compute_seconds
            continue
        if resident:
            steps.append((resident, None, 0))
            resident = 0.0
        if use.lookup:
            steps.append((use.compute_seconds, transfer.tier, transfer.lookup_bytes))
            continue
        total = sum(transfer.unit_bytes)
        for index, num_bytes in enumerate(transfer.unit_bytes):
            steps.append((use.compute_seconds * num_bytes / total, transfer.tier, 0))
            units.append((use.block, index, transfer.tier, num_bytes))
    if resident:
        steps.append((resident, None, 0))
    return steps, units


class _Ring:
    """The slots: which units are in them, and when each of them is there.

    Position p of the endless cyclic order is asked for when position p - num_slots is released.
    """

    def __init__(
        self, units: Sequence[_Unit], num_slots: int, request: Callable[[Tier, int], float]
    ) -> None:
        self._units = units
        self._num_slots = num_slots
        self._request = request
        self._repeats = len(set(units)) < len(units)
        self._live: dict[_Unit, float] = {}
        self._position = 0
        if units:
            for position in range(num_slots):
                self._ask(position)

    def next_done(self) -> float:
        """Return when the next unit of the order is in its slot."""
        return self._live[self._units[self._position % len(self._units)]]

    def release(self) -> None:
        """Free the slot of that unit and ask for the one that comes ``num_slots`` later."""
        self._position += 1
        self._ask(self._position + self._num_slots - 1)

    def _ask(self, position: int) -> None:
        unit = self._units[position % len(self._units)]
        if unit in self._live:
            return
        if len(self._live) == self._num_slots:
            del self._live[self._victim(position)]
        self._live[unit] = self._request(unit[2], unit[3])

    def _victim(self, position: int) -> _Unit:
        """Choose the unit that gives its slot up: the one whose next use is furthest away."""
        count = len(self._units)
        if not self._repeats:
            return self._units[(position - self._num_slots) % count]
        waiting = dict.fromkeys(self._live)
        for ahead in range(self._position, self._position + count):
            if len(waiting) == 1:
                break
            waiting.pop(self._units[ahead % count], None)
        return next(iter(waiting))
