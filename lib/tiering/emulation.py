"""Emulated tiers: charge the weight bytes that a tier would have to move, on a virtual clock or by
really waiting.

Nothing moves, so outputs are the model's own. ``time.sleep`` of 5 us takes far longer on
Linux; the wall clock therefore sleeps only through the bulk of a long wait and spins through the
rest, and reports what it achieved. On a GPU the wait is a spin kernel in the current stream:
launches stay asynchronous.
"""

import time
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import nn

from ..blocks import Block, storage_bytes, unique_parameters
from ..errors import InputError
from ..hints import Tier
from .specs import Clock, EmulationSpec, TierSpec

_SPIN_SECONDS = 2e-3
"""The end of each wait that is spun through: more than the scheduler's usual delay in waking a
sleeper.
"""
_CALIBRATION_CYCLES = 20_000_000


class Waiter(Protocol):
    """Spends a given time, and says how well it did."""

    def wait(self, seconds: float) -> None:
        """Spend the time."""

    def errors_us(self) -> list[float]:
        """Return overshoot per wait, in microseconds."""

    def reset(self) -> None:
        """Forget the errors."""


class HostWaiter:
    """Waits on the CPU."""

    def __init__(self) -> None:
        self._errors_us: list[float] = []

    def wait(self, seconds: float) -> None:
        """Block the calling thread for the time, to within about a microsecond."""
        deadline = time.perf_counter() + seconds
        if seconds > _SPIN_SECONDS:
            time.sleep(seconds - _SPIN_SECONDS)
        while (now := time.perf_counter()) < deadline:
            pass
        self._errors_us.append((now - deadline) * 1e6)

    def errors_us(self) -> list[float]:
        """Return overshoot per wait, in microseconds."""
        return self._errors_us

    def reset(self) -> None:
        """Forget the errors."""
        self._errors_us = []


class DeviceWaiter:
    """Waits on a CUDA device: a kernel that spins for a calibrated number of clock cycles in the
    current stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event, float]] = []
        self._spin(_CALIBRATION_CYCLES)  # the first launch pays for loading the kernel
        start, end = self._spin(_CALIBRATION_CYCLES)
        end.synchronize()
        self._cycles_per_second = _CALIBRATION_CYCLES / (start.elapsed_time(end) * 1e-3)

    def wait(self, seconds: float) -> None:
        """Enqueue the wait; returns at once."""
        self._waits.append((*self._spin(round(seconds * self._cycles_per_second)), seconds))

    def errors_us(self) -> list[float]:
        """Return overshoot per wait, in microseconds; waits for the device."""
        torch.cuda.synchronize(self._device)
        return [
            start.elapsed_time(end) * 1e3 - seconds * 1e6 for start, end, seconds in self._waits
        ]

    def reset(self) -> None:
        """Forget the errors."""
        self._waits = []

    def _spin(self, cycles: int) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        with torch.cuda.device(self._device):
            start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            start.record()
            torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]
            end.record()
        return start, end


class EmulatedResidency:
    """Charges each use of a block with its tier's transfer time."""

    def __init__(
        self, model: nn.Module, tiers: Mapping[str, Tier], spec: EmulationSpec, device: torch.device
    ) -> None:
        missing = sorted({str(tier) for tier in tiers.values() if tier not in spec.specs})
        if missing:
            raise InputError(
                f"tier {missing[0]} has no emulation spec: add it to the spec file's tiers"
            )
        self._tiers = tiers
        self._specs: dict[str, TierSpec] = {name: spec.specs[tier] for name, tier in tiers.items()}
        self._waiter: Waiter | None = None
        if spec.clock is Clock.WALL:
            self._waiter = DeviceWaiter(device) if device.type == "cuda" else HostWaiter()
        self._resident_bytes = storage_bytes(unique_parameters(model).values())
        self.virtual_seconds = 0.0

    def acquire(self, block: Block) -> tuple[int, float]:
        """Charge one use; returns the bytes moved into HBM and the virtual seconds charged (0 when
        really waited).
        """
        moved_bytes = 0 if self._tiers[block.name] is Tier.HBM else block.num_bytes
        seconds = self._specs[block.name].transfer_seconds(block.num_bytes)
        if self._waiter is not None:
            self._waiter.wait(seconds)
            return moved_bytes, 0.0
        self.virtual_seconds += seconds
        return moved_bytes, seconds

    def release(self, block: Block) -> None:
        """Nothing was moved, so nothing is given back."""

    def resident_bytes(self) -> int:
        """Return the weight bytes in memory: the whole model, since nothing really moves."""
        return self._resident_bytes

    def reset(self) -> None:
        """Start the virtual clock and the error statistics anew."""
        self.virtual_seconds = 0.0
        if self._waiter is not None:
            self._waiter.reset()

    def wait_error(self) -> dict[str, float] | None:
        """Return mean, p95 and largest overshoot in microseconds, and the number of waits; None on
        a virtual clock.
        """
        if self._waiter is None or not (errors := self._waiter.errors_us()):
            return None
        ordered = sorted(errors)
        return {
            "mean_us": sum(errors) / len(errors),
            "p95_us": ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
            "max_us": ordered[-1],
            "n": len(errors),
        }

    def close(self) -> None:
        """Nothing to restore."""
