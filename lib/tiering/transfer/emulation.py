"""Emulated tiers: the time that moving weights would take, on a virtual clock or by really waiting.

The plan, the schedule and the prefetching are those of a real runtime; only the transport is
another. Nothing moves, so outputs are the model's own.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...vocabulary import Tier
from .charges import Charges
from .specs import Clock, EmulationSpec
from .transport import Ticket, Unit
from .waiting import DeviceWaiter, HostWaiter, Waiter


class EmulatedTime(Charges):
    """The clock of a hypothetical machine.

    Each tier is one link, first come first served: a transfer starts when it is asked for or when
    the one before it ends, takes setup plus bytes over bandwidth, and goes on while the model
    computes; only what is left of it when its unit is needed is waited for. What isn't urgent
    begins when nothing else is on the link, and ends undisturbed. The model's own compute
    is the real one, made slower by the spec's contention while a link is busy. On an accelerator
    the host waits for the device before it looks at the clock.
    """

    def __init__(self, spec: EmulationSpec, device: torch.device) -> None:
        self.spec = spec
        """What is charged for; another one takes effect at once."""
        self.clock: Callable[[], float] = time.perf_counter
        """Seconds of compute: on a machine that others use too, rather those of the thread."""
        self._device = device
        self._free_at: dict[Tier, float] = {}
        self._behind: dict[Tier, deque[Ticket]] = {}
        """What isn't urgent and has not begun."""
        self._waiter: Waiter | None = None
        if spec.clock is Clock.WALL:
            self._waiter = DeviceWaiter(device) if device.type == "cuda" else HostWaiter()
        self._computing_since = 0.0
        self._waited = 0.0
        self._waited_before = 0.0
        self._computing_since = self.now()

    @property
    def virtual_seconds(self) -> float:
        """What was waited for on the virtual clock since the last reset."""
        return self._waited - self._waited_before

    def fetch(self, tier: Tier, num_bytes: int) -> None:
        """Charge a transfer that the schedule doesn't have: rows of an embedding."""
        self._pass(self.enqueue(tier, num_bytes) - self.now())

    def use_in_place(self, num_bytes: int) -> None:
        """Charge one use of weights in HBM, where the spec says so."""
        if self.spec.charge_hbm:
            self._pass(self.spec.specs[Tier.HBM].transfer_seconds(num_bytes))

    def reset(self) -> None:
        """Start the virtual clock and the error statistics anew."""
        self._waited_before = self._waited
        if self._waiter is not None:
            self._waiter.reset()

    def wait_error(self) -> dict[str, float] | None:
        """Return mean, p95 and largest overshoot in microseconds, and the number of waits; None on
        a virtual clock.
        """
        return None if self._waiter is None else self._waiter.overshoot().summary()

    def enqueue(self, tier: Tier, num_bytes: int) -> float:
        """Put a transfer in its tier's queue; returns when it ends, on this clock."""
        now = self.now()
        self._begin_behind(tier, now)
        return self._carry(tier, num_bytes, now)

    def enqueue_behind(self, ticket: Ticket) -> None:
        """Put a transfer behind all that is urgent; it is ``due`` once it has begun."""
        ticket.due = math.inf
        self._behind.setdefault(ticket.unit.tier, deque()).append(ticket)

    def withdraw(self, ticket: Ticket) -> bool:
        """Take a transfer out that has not begun; returns whether it had not."""
        self._begin_behind(ticket.unit.tier, self.now())
        if ticket.due < math.inf:
            return False
        self._behind[ticket.unit.tier].remove(ticket)
        return True

    def has_arrived(self, ticket: Ticket) -> bool:
        """Say whether a transfer has ended."""
        now = self.now()
        self._begin_behind(ticket.unit.tier, now)
        return ticket.due <= now

    def wait_for(self, ticket: Ticket) -> None:
        """Let the time pass until a transfer ends; what follows is compute."""
        self.slow_compute()
        tier, now = ticket.unit.tier, self.now()
        self._begin_behind(tier, now)
        while ticket.due == math.inf:
            self._begin_next(tier, now)
        self._pass(ticket.due - now)
        self._computing_since = self.now()

    def _begin_behind(self, tier: Tier, now: float) -> None:
        """Begin what isn't urgent and found the link free before now."""
        behind = self._behind.get(tier)
        while behind and max(self._free_at.get(tier, 0.0), behind[0].asked) < now:
            self._begin_next(tier, behind[0].asked)

    def _begin_next(self, tier: Tier, since: float) -> None:
        ticket = self._behind[tier].popleft()
        ticket.due = ticket.ended = self._carry(tier, ticket.unit.data_bytes, since)

    def _carry(self, tier: Tier, num_bytes: int, since: float) -> float:
        """Use the link from then on, when it is free; returns until when."""
        start = max(since, self._free_at.get(tier, 0.0))
        due = start + self.spec.specs[tier].transfer_seconds(num_bytes)
        self._free_at[tier] = due
        return due

    def slow_compute(self) -> None:
        """Charge what compute since the last look would have lost to transfers that went on."""
        now = self.now()
        busy = max(self._free_at.values(), default=0.0)
        shared = min(now, busy) - self._computing_since
        if shared > 0:
            self._pass(self.spec.contention * shared)
        self._computing_since = self.now()

    def now(self) -> float:
        """Return the time on this clock."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self.clock() + self._waited

    def _pass(self, seconds: float) -> None:
        if seconds <= 0:
            return
        if self._waiter is not None:
            self._waiter.wait(seconds)
        else:
            self._waited += seconds


class EmulatedTransport:
    """Moves nothing: a unit has arrived when the time is over that its transfer would take."""

    def __init__(self, time: EmulatedTime) -> None:
        self._time = time
        self._link_seconds = 0.0

    def make_slots(self, num_slots: int, slot_bytes: int) -> None:
        """Nothing is allocated, since nothing moves."""

    def another(self) -> "EmulatedTransport":
        """Make one on the same links."""
        return EmulatedTransport(self._time)

    def add_slot(self, num_bytes: int) -> int:
        """There are no slots to tell apart."""
        return 0

    def drop_slot(self, slot: int) -> None:
        """Nothing was allocated."""

    def submit(self, unit: Unit, slot: int, *, urgent: bool = True) -> Ticket:
        """Put a transfer in its tier's queue."""
        self._time.slow_compute()
        ticket = Ticket(unit, slot, asked=self._time.now())
        if urgent:
            ticket.due = ticket.ended = self._time.enqueue(unit.tier, unit.data_bytes)
        else:
            self._time.enqueue_behind(ticket)
        self._link_seconds += self._seconds(unit)
        ticket.arrived.set()
        return ticket

    def _seconds(self, unit: Unit) -> float:
        return self._time.spec.specs[unit.tier].transfer_seconds(unit.data_bytes)

    def wait(self, ticket: Ticket) -> None:
        """Let the time pass until the transfer ends."""
        self._time.wait_for(ticket)

    def withdraw(self, ticket: Ticket) -> bool:
        """Take a transfer out of its tier's queue, if it has not begun."""
        if ticket.is_withdrawn or not self._time.withdraw(ticket):
            return ticket.is_withdrawn
        ticket.is_withdrawn = True
        self._link_seconds -= self._seconds(ticket.unit)
        return True

    def has_arrived(self, ticket: Ticket) -> bool:
        """Say whether the time is over that the transfer takes."""
        return self._time.has_arrived(ticket)

    def done_with(self, slot: int, *, shared: bool) -> bool:
        """Nothing was moved, so nothing is overwritten."""
        return True

    def is_lent(self, slot: int) -> bool:
        """There are no slots to have views of."""
        return False

    def left_bytes(self) -> int:
        """There are no former slots."""
        return 0

    def slots(self) -> Sequence[Tensor]:
        """There are no slots."""
        return ()

    def take_link_seconds(self) -> float:
        """Return what the transfers since the last call take one after the other."""
        seconds, self._link_seconds = self._link_seconds, 0.0
        return seconds

    def close(self) -> None:
        """Nothing to end."""
