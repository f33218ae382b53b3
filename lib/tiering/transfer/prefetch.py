"""The transfer engine: which unit goes into which slot, and when.

The order of use is traced in each forward and expected again in the next, wrapping around: as soon
as a slot is free, the unit whose use comes next is asked for. Units that are used twice, skipped,
or used in another order are found further ahead in the schedule, or fetched when they are asked
for. A slot is given to another unit only once its own is not held and no other slot's use lies
further ahead (Belady's rule, which is optimal for a known order).
"""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import Tensor

from ...errors import PlacementError
from .transitions import TransitionLog
from .transport import Ticket, Transport, Unit


@dataclass(slots=True, eq=False)
class _Live:
    """A unit in a slot, or on its way into it."""

    ticket: Ticket
    holds: int = 0
    used: bool = False
    """It has arrived, and was noted."""


class Prefetcher:
    """Holds units in slots for as long as they are used, and fetches the next ones meanwhile.

    Used by one thread. ``schedule`` is the order expected before the first forward is traced.
    """

    def __init__(
        self,
        transport: Transport,
        num_slots: int,
        schedule: Sequence[Unit],
        *,
        slot_bytes: int = 2**63,
        log: TransitionLog | None = None,
    ) -> None:
        self.slot_bytes = slot_bytes if num_slots else 0
        """The largest unit that can be acquired."""
        self._transport = transport
        self._log = log
        self._num_slots = num_slots
        self._free = list(range(num_slots))
        self._live: dict[Unit, _Live] = {}
        self._lent: set[Unit] = set()
        """Units of whose slots callers have views: they are held for as long."""
        self._trace: list[Unit] = []
        self._tracing = False
        """Uses between two forwards are none of the schedule, and may be any number."""
        self._set_schedule([unit for unit in schedule if unit.num_bytes <= slot_bytes])

    def has_room(self, units: Collection[Unit]) -> bool:
        """Say whether units can be acquired and held together, beside what is held now."""
        self._take_back()
        held = sum(1 for unit, live in self._live.items() if live.holds and unit not in units)
        largest = max((unit.num_bytes for unit in units), default=0)
        return not units or (held + len(units) <= self._num_slots and largest <= self.slot_bytes)

    def acquire(self, unit: Unit) -> Tensor | None:
        """Return a unit's bytes in fast memory, for as long as it is held; nests.

        Blocks until they are there. Raises PlacementError where they are not sound, and where the
        slots are all held.
        """
        self._take_back()
        if self._tracing:
            self._trace.append(unit)
        if unit in self._lent:  # it was held on because of views
            self._lent.discard(unit)
            self._live[unit].holds -= 1
        live = self._live.get(unit)
        if live is None:
            live = self._submit(unit, self._take_slot(unit, for_use=True))
        live.holds += 1
        try:
            self._advance(unit)
            self._prefetch()
            memory = self._transport.wait(live.ticket)
            if not live.used:
                self._note_arrival(unit, live)
            return memory
        except BaseException as error:
            live.holds -= 1
            if live.holds == 0 and not isinstance(error, KeyboardInterrupt):
                self._drop(unit)
            raise

    def release(self, unit: Unit, *, shared: bool) -> None:
        """End one hold; the slot may then serve another unit. ``shared`` as in
        ``Transport.done_with``.
        """
        live = self._live[unit]
        if shared and live.holds == 1 and self._transport.is_lent(live.ticket.slot):
            self._lent.add(unit)
            return
        live.holds -= 1
        if live.holds == 0:
            if not self._transport.done_with(live.ticket.slot, shared=shared):
                self._drop(unit)
            self._prefetch()

    @property
    def in_flight(self) -> set[str]:
        """The groups of which something is on its way."""
        live = list(self._live.items())  # of another thread, perhaps
        return {unit.group for unit, each in live if not each.ticket.arrived.is_set()}

    @property
    def in_slots(self) -> set[str]:
        """The groups of which something is in a slot."""
        live = list(self._live.items())
        return {unit.group for unit, each in live if each.ticket.arrived.is_set()}

    @property
    def lent(self) -> list[str]:
        """Name the groups of whose slots callers have views."""
        self._take_back()
        return sorted({unit.group for unit in self._lent})

    def _take_back(self) -> None:
        """End the holds of lent slots without any view left."""
        for unit in list(self._lent):
            if not self._transport.is_lent(self._live[unit].ticket.slot):
                self._lent.discard(unit)
                self.release(unit, shared=True)

    def begin_forward(self) -> None:
        """Start a trace; the schedule is expected from its beginning."""
        self._trace, self._tracing = [], True
        self._cursor = 0

    def end_forward(self) -> None:
        """Expect the next forward to use what this one used."""
        if self._trace and self._trace != self._schedule:
            self._set_schedule(self._trace)
        self._trace, self._tracing = [], False
        self._cursor = 0
        self._prefetch()

    def end_holds(self) -> None:
        """End the holds that an interrupted forward left behind; slots that it lost are free
        again.
        """
        for unit, live in list(self._live.items()):
            if live.holds and unit not in self._lent:
                live.holds = 0
                if not self._transport.done_with(live.ticket.slot, shared=True):
                    self._drop(unit)
        self._tracing = False
        taken = {live.ticket.slot for live in self._live.values()}
        self._free = [slot for slot in range(self._num_slots) if slot not in taken]

    def forget_failed(self) -> None:
        """Let go of what could not be read ahead, once all has arrived: a use reads it anew."""
        for unit, live in list(self._live.items()):
            live.ticket.arrived.wait()
            if live.ticket.error is not None and not live.holds:
                self._drop(unit)

    def drain(self) -> None:
        """Wait for what is on its way and forget it; nothing may be held."""
        for unit in list(self._live):
            self._drop(unit)

    def _set_schedule(self, schedule: list[Unit]) -> None:
        self._schedule = schedule
        self._cursor = 0
        self._places: dict[Unit, list[int]] = {}
        for place, unit in enumerate(schedule):
            self._places.setdefault(unit, []).append(place)

    def _distance(self, unit: Unit) -> int:
        """Count the uses until a unit's next; beyond all others if it is not expected."""
        places = self._places.get(unit)
        if not places:
            return len(self._schedule)
        return min((place - self._cursor) % len(self._schedule) for place in places)

    def _advance(self, unit: Unit) -> None:
        if unit in self._places:
            self._cursor = (self._cursor + self._distance(unit) + 1) % len(self._schedule)

    def _prefetch(self) -> None:
        """Ask for the units used next, as far as there are slots for them."""
        wanted = 0
        for ahead in range(len(self._schedule)):
            if wanted == self._num_slots:
                return
            unit = self._schedule[(self._cursor + ahead) % len(self._schedule)]
            live = self._live.get(unit)
            if live is None:
                slot = self._take_slot(unit, for_use=False)
                if slot is None:
                    return
                self._submit(unit, slot)
            wanted += 1

    def _take_slot(self, unit: Unit, *, for_use: bool) -> int | None:
        if self._free:
            return self._free.pop()
        idle = [
            (self._distance(other), other) for other, live in self._live.items() if not live.holds
        ]
        if not for_use:
            # Bytes on their way are not thrown away for others that are needed later.
            limit = self._distance(unit)
            idle = [
                (distance, other)
                for distance, other in idle
                if distance > limit and self._live[other].ticket.arrived.is_set()
            ]
            if not idle:
                return None
        if not idle:
            raise PlacementError(
                f"{unit.group}: all {self._num_slots} slots are held by weights in use at the same "
                "time; give a larger HBM budget"
            )
        victim = max(idle, key=lambda item: item[0])[1]
        self._drop(victim)
        return self._free.pop()

    def _submit(self, unit: Unit, slot: int | None) -> _Live:
        assert slot is not None
        try:
            live = _Live(self._transport.submit(unit, slot))
        except BaseException:
            self._free.append(slot)
            raise
        self._live[unit] = live
        return live

    def _note_arrival(self, unit: Unit, live: _Live) -> None:
        live.used = True
        if self._log is not None:
            ticket = live.ticket  # a copy on a stream has no end that the host sees
            ended = ticket.ended or time.perf_counter()
            self._log.arrive(unit.group, ticket.asked, ended, unit.num_bytes)

    def _drop(self, unit: Unit) -> None:
        """Free a unit's slot, once nothing writes into it any more."""
        live = self._live[unit]
        live.ticket.arrived.wait()
        if live.used and self._log is not None:
            self._log.leave(unit.group)
        del self._live[unit]
        self._free.append(live.ticket.slot)
