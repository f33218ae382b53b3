"""Spending a given time precisely, and knowing by how much it was missed.

``time.sleep`` of 5 us takes far longer on Linux: the wait sleeps only through the bulk of a long
one and spins through the rest. On a GPU it is a spin kernel in the current stream: launches stay
asynchronous.
"""

import random
import time
from typing import Protocol

import torch

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
