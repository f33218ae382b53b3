"""What a worker measures beside the time: the link that weights come over, and a device's memory.

``DiskMeter``: no GPU, weights come from a disk. ``CopyMeter``: they come from pinned host memory to
a CUDA device, whose memory this also limits.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch

from lib.tiering.probe.links import FileProbe
from lib.units import GB, MIB, format_bytes

PROBE_SECONDS = 0.15
CONTENTION_SECONDS = 6.0
SETTLE_SECONDS = 0.1
"""Before a disk is measured: what is being prefetched should have arrived."""
_DISK_UNIT_BYTES = 8 * MIB
_COPY_UNIT_BYTES = 64 * MIB
"""Of copies to a device, for who doesn't say what its units are."""
_COPY_BUFFER_BYTES = 512 * MIB


class Meter(Protocol):
    """Measures for one worker."""

    def synchronize(self) -> None:
        """Wait until what was asked of the device for a token is done."""

    def use_units(self, num_bytes: int | None) -> None:
        """Measure the link with transfers of this size from now on; None: of the usual one."""

    def measure_link(self) -> float:
        """Return its bytes per second now; nothing else may use it meanwhile."""

    def measure_contention(self, compute: Callable[[], object]) -> dict[str, float] | None:
        """Return how a computation and the link slow each other; None where that isn't known."""

    def memory(self) -> dict[str, int] | None:
        """Return the device's memory in use so far; None where it has no memory of its own."""

    def close(self) -> None:
        """Free what was needed to measure."""


class DiskMeter:
    """The disk of a folder, read as our runtime reads."""

    def __init__(self, folder: Path, *, weight_bytes: int) -> None:
        """Write the file to read, as large as the weights that are streamed: a small one may lie
        in a cache below the disk. Memory for it is taken now, not later.
        """
        self._probe = FileProbe(folder, file_bytes=max(weight_bytes // MIB * MIB, 256 * MIB))
        self._probe.measure(_DISK_UNIT_BYTES, seconds=0)

    def synchronize(self) -> None:
        """A CPU's results are there when a call returns."""

    def use_units(self, num_bytes: int | None) -> None:
        """A disk is always read in units of 8 MiB: reads are cut into smaller pieces anyway."""

    def measure_link(self) -> float:
        """Return the disk's bytes per second."""
        time.sleep(SETTLE_SECONDS)
        return self._probe.measure(_DISK_UNIT_BYTES, seconds=PROBE_SECONDS).bandwidth_gb_s * GB

    def measure_contention(self, compute: Callable[[], object]) -> dict[str, float]:
        """Read the disk while the model computes, and each alone."""
        contention = self._probe.measure_contention(
            compute, unit_bytes=_DISK_UNIT_BYTES, seconds=CONTENTION_SECONDS
        )
        return asdict(contention)

    def memory(self) -> None:
        """RAM is the whole process's, and is measured from outside."""
        return None

    def close(self) -> None:
        """Remove the file."""
        self._probe.close()


class CopyMeter:
    """Copies out of pinned host memory, timed with events. ``limit_bytes`` is what the process may
    take of the device through torch, beside the meter's own buffer; None: no limit.

    Memory that is not torch's is not limited: the CUDA context, and what a library allocates
    itself; ``device_used_bytes`` has it.
    """

    def __init__(self, *, limit_bytes: int | None) -> None:
        """Raises MemoryError where the device has less than the limit."""
        self._device = torch.device("cuda", torch.cuda.current_device())
        total = torch.cuda.get_device_properties(self._device).total_memory
        self._host = torch.ones(_COPY_BUFFER_BYTES, dtype=torch.uint8, pin_memory=True)
        self._target = torch.empty(_COPY_BUFFER_BYTES, dtype=torch.uint8, device=self._device)
        self._stream = torch.cuda.Stream(self._device)
        self._unit_bytes = _COPY_UNIT_BYTES
        self._own_bytes = torch.cuda.memory_reserved(self._device)
        self._own_pinned_bytes = _pinned_bytes()
        self._used_before = self._used_bytes()
        if limit_bytes is not None:
            allowed = limit_bytes + self._own_bytes
            if allowed > total:
                raise MemoryError(
                    f"the device has {format_bytes(total)}, and the limit with the "
                    f"{format_bytes(self._own_bytes)} of the meter is {format_bytes(allowed)}: "
                    "give a smaller --gpu-budget-gib"
                )
            torch.cuda.set_per_process_memory_fraction(allowed / total, self._device)
        torch.cuda.reset_peak_memory_stats(self._device)

    def synchronize(self) -> None:
        """Wait for the computing stream alone: prefetching goes on meanwhile."""
        torch.cuda.current_stream(self._device).synchronize()

    def use_units(self, num_bytes: int | None) -> None:
        """Take units of this size, as far as the meter's buffer goes."""
        self._unit_bytes = min(num_bytes or _COPY_UNIT_BYTES, _COPY_BUFFER_BYTES)

    def measure_link(self) -> float:
        """Return the median bytes per second of several rounds of copies."""
        torch.cuda.synchronize(self._device)
        rates: list[float] = []
        end = time.perf_counter() + PROBE_SECONDS
        while not rates or time.perf_counter() < end:
            rates.append(self._time_copies())
        return statistics.median(rates)

    def measure_contention(self, compute: Callable[[], object]) -> None:
        """Return None: copy engines take no part of what computes."""
        return None

    def memory(self) -> dict[str, int]:
        """Return peaks without the meter's own; ``pinned_bytes``: what torch has pinned."""
        return {
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(self._device) - self._own_bytes,
            "device_used_bytes": self._used_bytes() - self._used_before,
            "pinned_bytes": _pinned_bytes() - self._own_pinned_bytes,
        }

    def close(self) -> None:
        """Let go of the buffers."""
        self._host = self._target = torch.empty(0)

    def _time_copies(self) -> float:
        """Copy the buffer once, unit after unit."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        starts = range(0, _COPY_BUFFER_BYTES - self._unit_bytes + 1, self._unit_bytes)
        with torch.cuda.stream(self._stream):
            begin.record(self._stream)
            for start in starts:
                unit = slice(start, start + self._unit_bytes)
                self._target[unit].copy_(self._host[unit], non_blocking=True)
            end.record(self._stream)
        end.synchronize()
        seconds = begin.elapsed_time(end) / 1000
        return float(len(starts) * self._unit_bytes / seconds)

    def _used_bytes(self) -> int:
        free, total = torch.cuda.mem_get_info(self._device)
        return int(total - free)


def describe_gpu() -> dict[str, Any]:
    """Return the device's name and sizes; takes a CUDA context."""
    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "free_bytes": torch.cuda.mem_get_info(device)[0],
        "compute_capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
    }


def _pinned_bytes() -> int:
    """Return the most host memory that torch's allocator has had pinned (in powers of two)."""
    return int(torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0))
