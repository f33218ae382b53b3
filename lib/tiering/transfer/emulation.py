"""Emulated tiers: the time that moving weights would take, on a virtual clock or by really waiting.

The plan, the schedule and the prefetching are those of a real runtime; only the link is another.
Nothing moves, so outputs are the model's own. ``time.sleep`` of 5 us takes far longer on
Linux; the wall clock therefore sleeps only through the bulk of a long wait and spins through the
rest, and reports what it achieved. On a GPU the wait is a spin kernel in the current stream:
launches stay asynchronous.
"""

import random
import time
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ...errors import InputError
from ...policy.plan import Plan
from ...vocabulary import Tier
from .link import Ticket, Unit
from .specs import Clock, EmulationSpec

_SPIN_SECONDS = 2e-3
"""The end of each wait that is spun through: more than the scheduler's usual delay in waking a
sleeper.
"""
_CALIBRATION_CYCLES = 20_000_000
_SAMPLE = 4_096
"""Waits that the p95 of their errors is taken of."""
_MAX_OPEN_WAITS = 4_096
"""Waits on a device that are kept before their events are read."""


class Overshoot:
    """By how much waits were too long, in memory that doesn't grow with their number.

    Number, mean and largest are of all waits; p95 is of a uniform sample of them, all at first
    (reservoir sampling: Vitter 1985, algorithm R).
    """

    def __init__(self) -> None:
        self.sample: list[float] = []
        """Microseconds."""
        self._count = 0
        self._total = 0.0
        self._largest = 0.0
        self._dice = random.Random(0)

    def add(self, error_us: float) -> None:
        """Count one wait."""
        self._count += 1
        self._total += error_us
        self._largest = error_us if self._count == 1 else max(self._largest, error_us)
        if len(self.sample) < _SAMPLE:
            self.sample.append(error_us)
        elif (place := self._dice.randrange(self._count)) < _SAMPLE:
            self.sample[place] = error_us

    def summary(self) -> dict[str, float] | None:
        """Return mean, p95 and largest in microseconds, and the number of waits; None of none."""
        if not self._count:
            return None
        ordered = sorted(self.sample)
        return {
            "mean_us": self._total / self._count,
            "p95_us": ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
            "max_us": self._largest,
            "n": self._count,
        }


class Waiter(Protocol):
    """Spends a given time, and says how well it did."""

    def wait(self, seconds: float) -> None:
        """Spend the time."""

    def overshoot(self) -> Overshoot:
        """Return the errors of the waits since the last reset."""

    def reset(self) -> None:
        """Forget the errors."""


class HostWaiter:
    """Waits on the CPU."""

    def __init__(self) -> None:
        self._overshoot = Overshoot()

    def wait(self, seconds: float) -> None:
        """Block the calling thread for the time, to within about a microsecond."""
        deadline = time.perf_counter() + seconds
        if seconds > _SPIN_SECONDS:
            time.sleep(seconds - _SPIN_SECONDS)
        while (now := time.perf_counter()) < deadline:
            pass
        self._overshoot.add((now - deadline) * 1e6)

    def errors_us(self) -> list[float]:
        """Return overshoot per wait, in microseconds, of a sample of the waits."""
        return self._overshoot.sample

    def overshoot(self) -> Overshoot:
        """Return the errors of the waits since the last reset."""
        return self._overshoot

    def reset(self) -> None:
        """Forget the errors."""
        self._overshoot = Overshoot()


class DeviceWaiter:
    """Waits on a CUDA device: a kernel that spins for a calibrated number of clock cycles in the
    current stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._overshoot = Overshoot()
        self._open: list[tuple[torch.cuda.Event, torch.cuda.Event, float]] = []
        self._spin(_CALIBRATION_CYCLES)  # the first launch pays for loading the kernel
        start, end = self._spin(_CALIBRATION_CYCLES)
        end.synchronize()
        self._cycles_per_second = _CALIBRATION_CYCLES / (start.elapsed_time(end) * 1e-3)

    def wait(self, seconds: float) -> None:
        """Enqueue the wait; returns at once, but for one time in ``_MAX_OPEN_WAITS``."""
        self._open.append((*self._spin(round(seconds * self._cycles_per_second)), seconds))
        if len(self._open) >= _MAX_OPEN_WAITS:
            self._settle()

    def overshoot(self) -> Overshoot:
        """Return the errors of the waits since the last reset; waits for the device."""
        self._settle()
        return self._overshoot

    def reset(self) -> None:
        """Forget the errors."""
        self._open, self._overshoot = [], Overshoot()

    def _settle(self) -> None:
        """Read the events of the waits so far."""
        torch.cuda.synchronize(self._device)
        for start, end, seconds in self._open:
            self._overshoot.add(start.elapsed_time(end) * 1e3 - seconds * 1e6)
        self._open = []

    def _spin(self, cycles: int) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        with torch.cuda.device(self._device):
            start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            start.record()
            torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]
            end.record()
        return start, end


class EmulatedLink:
    """Lets the time pass that hypothetical tiers would take, and moves nothing.

    Each tier is one link, first come first served: a transfer starts when it is asked for or when
    the one before it ends, takes setup plus bytes over bandwidth, and goes on while the model
    computes; only what is left of it when its unit is needed is waited for. The model's own compute
    is the real one, made slower by the spec's contention while a link is busy. On an accelerator
    the host waits for the device before it looks at the clock.
    """

    def __init__(self, spec: EmulationSpec, device: torch.device) -> None:
        self.spec = spec
        """What is charged for; another one takes effect at once."""
        self._device = device
        self._free_at: dict[Tier, float] = {}
        self._waiter: Waiter | None = None
        if spec.clock is Clock.WALL:
            self._waiter = DeviceWaiter(device) if device.type == "cuda" else HostWaiter()
        self._computing_since = 0.0
        self._waited = 0.0
        self._waited_before = 0.0
        self._computing_since = self._now()

    @property
    def virtual_seconds(self) -> float:
        """What was waited for on the virtual clock since the last reset."""
        return self._waited - self._waited_before

    def check(self, plan: Plan) -> None:
        """Refuse a plan with a tier that the machine lacks; raises InputError."""
        tiers = {placement.tier for placement in plan.placements.values()}
        if not self.spec.charge_hbm:
            tiers.discard(Tier.HBM)
        if missing := tiers - self.spec.specs.keys():
            raise InputError(
                f"tier {min(missing)} has no emulation spec: add it to the spec file's tiers"
            )

    def make_slots(self, num_slots: int, slot_bytes: int) -> None:
        """Nothing is allocated, since nothing moves."""

    def submit(self, unit: Unit, slot: int) -> Ticket:
        """Put a transfer in its tier's queue."""
        self._slow_compute()
        ticket = Ticket(unit, slot)
        ticket.due = self._enqueue(unit.tier, unit.data_bytes)
        ticket.arrived.set()
        return ticket

    def wait(self, ticket: Ticket) -> None:
        """Let the time pass until the transfer ends."""
        self._slow_compute()
        self._pass(ticket.due - self._now())
        self._computing_since = self._now()

    def done_with(self, slot: int, *, shared: bool) -> bool:
        """Nothing was moved, so nothing is overwritten."""
        return True

    def is_lent(self, slot: int) -> bool:
        """Say that nothing was: all weights are in memory."""
        return False

    def left_bytes(self) -> int:
        """Say that nothing was."""
        return 0

    def fetch(self, tier: Tier, num_bytes: int) -> None:
        """Charge a transfer that nobody foresaw: rows of an embedding."""
        self._pass(self._enqueue(tier, num_bytes) - self._now())

    def use_in_place(self, num_bytes: int) -> None:
        """Charge one use of weights in HBM, where the spec says so."""
        if self.spec.charge_hbm:
            self._pass(self.spec.specs[Tier.HBM].transfer_seconds(num_bytes))

    def slots(self) -> Sequence[Tensor]:
        """Return nothing: there are no slots."""
        return ()

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

    def close(self) -> None:
        """Nothing to end."""

    def _slow_compute(self) -> None:
        """Charge what compute since the last look would have lost to transfers that went on."""
        now = self._now()
        busy = max(self._free_at.values(), default=0.0)
        shared = min(now, busy) - self._computing_since
        if shared > 0:
            self._pass(self.spec.contention * shared)
        self._computing_since = self._now()

    def _enqueue(self, tier: Tier, num_bytes: int) -> float:
        start = max(self._now(), self._free_at.get(tier, 0.0))
        due = start + self.spec.specs[tier].transfer_seconds(num_bytes)
        self._free_at[tier] = due
        return due

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() + self._waited

    def _pass(self, seconds: float) -> None:
        if seconds <= 0:
            return
        if self._waiter is not None:
            self._waiter.wait(seconds)
        else:
            self._waited += seconds
