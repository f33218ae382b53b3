"""Measures what reading from each tier of this machine takes: setup time and bandwidth.

A tier is read as the runtime reads it: units are cut into pieces of PIECE_BYTES, NUM_READERS
threads read and check them straight into page-aligned memory, and the next unit is asked for before
the last one has arrived. Memory in front of a CUDA device is pinned, and copied by the device.
Disks and busy machines drift: tiers and sizes take turns, and medians are kept.
"""

import itertools
import math
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from ...errors import InputError
from ...machine import MachineProfile, TierSpec, fit_tier
from ...units import KIB, MIB, format_bytes
from ...vocabulary import Tier
from ..stores import (
    CHUNK_BYTES,
    FileStore,
)
from .lanes import Lane, ReaderLane

UNIT_SIZES = (256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB)
_TURNS = 2
"""A computation is timed alone and beside reads in turns: machines drift."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contention:
    """How computing and reading disturb each other: both want cores and memory bandwidth.

    ``slowdown``: by what share a computation is slower while a disk is read; ``link_share``: what
    is left of the disk's bandwidth while it computes, at most 1.
    """

    slowdown: float
    link_share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Seconds that a unit of ``num_bytes`` took: median and 95th percentile of n timings."""

    num_bytes: int
    median_s: float
    p95_s: float
    n: int


class FileProbe:
    """A file on a disk, written once, that can be timed again and again: disks drift, and what is
    compared with one must be measured in the same minute. A context manager; its end removes the
    file.
    """

    def __init__(self, folder: Path | None, *, file_bytes: int = 256 * MIB) -> None:
        self._file_bytes = file_bytes
        self._lane = ReaderLane(FileStore(folder, temporary=True), "disk", file_bytes)

    def measure(self, unit_bytes: int | Sequence[int], *, seconds: float) -> TierSpec:
        """Time units of one size (the spec has no setup time then) or of several in turns, for
        about so many seconds, each at least once. Sizes are rounded up to whole chunks.
        """
        sizes = [unit_bytes] if isinstance(unit_bytes, int) else list(unit_bytes)
        sizes = [-(-size // CHUNK_BYTES) * CHUNK_BYTES for size in sizes]
        if max(sizes) > self._file_bytes:
            raise InputError(
                f"units of {format_bytes(max(sizes))} are larger than the probe's file of "
                f"{format_bytes(self._file_bytes)}: give it more file_bytes"
            )
        points = time_lanes([self._lane], sizes, rounds=_until(time.perf_counter() + seconds))
        return fit_points("disk", points[Tier.SSD])

    def measure_contention(
        self, compute: Callable[[], object], *, unit_bytes: int, seconds: float
    ) -> Contention:
        """Time a computation and reads of units, each alone and both at once, in turns.

        Takes about so many seconds, and two calls each way at least.
        """
        size = -(-unit_bytes // CHUNK_BYTES) * CHUNK_BYTES
        turn = seconds / (3 * _TURNS)
        alone: list[float] = []
        shared: list[float] = []
        reads_alone: list[float] = []
        reads_shared: list[float] = []
        stop = threading.Event()

        def read() -> None:
            while not stop.is_set():
                reads_shared.append(self._lane.unit_seconds(size))

        compute()  # the first call may allocate
        for _ in range(_TURNS):
            _time_calls(compute, alone, turn)
            for _ in _until(time.perf_counter() + turn):
                reads_alone.append(self._lane.unit_seconds(size))
            stop.clear()
            reader = threading.Thread(target=read)
            reader.start()
            try:
                _time_calls(compute, shared, turn)
            finally:
                stop.set()
                reader.join()
        return Contention(
            slowdown=max(statistics.median(shared) / statistics.median(alone) - 1, 0.0),
            link_share=min(statistics.median(reads_alone) / statistics.median(reads_shared), 1.0),
        )

    def close(self) -> None:
        """Remove the file."""
        self._lane.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def time_lanes(
    lanes: Sequence[Lane], sizes: Sequence[int], rounds: Iterable[object]
) -> dict[Tier, list[Point]]:
    """Time every lane at every size, once per round and after one round of warm-up."""
    seconds: dict[tuple[Tier, int], list[float]] = {}
    for warm_up, _ in itertools.chain([(True, None)], ((False, each) for each in rounds)):
        for lane in lanes:
            for size in sizes:
                elapsed = lane.unit_seconds(size)
                if not warm_up:
                    seconds.setdefault((lane.tier, size), []).append(elapsed)
    points: dict[Tier, list[Point]] = {lane.tier: [] for lane in lanes}
    for (tier, size), timings in seconds.items():
        points[tier].append(
            Point(
                num_bytes=size,
                median_s=statistics.median(timings),
                p95_s=sorted(timings)[math.ceil(0.95 * len(timings)) - 1],
                n=len(timings),
            )
        )
    return points


def make_profile(
    name: str,
    lanes: Sequence[Lane],
    points: Mapping[Tier, Sequence[Point]],
    compute: Mapping[str, float],
) -> MachineProfile:
    """Fit each tier's points, and put them together with capacities and compute rates."""
    return MachineProfile(
        name=name,
        tiers={lane.tier: fit_points(lane.name, points[lane.tier]) for lane in lanes},
        capacity_bytes={
            lane.tier: lane.capacity_bytes for lane in lanes if lane.capacity_bytes is not None
        },
        compute=compute,
        measured=True,
    )


def fit_points(name: str, points: Sequence[Point]) -> TierSpec:
    """Fit setup time and bandwidth to medians."""
    return fit_tier(name, [(point.num_bytes, point.median_s) for point in points])


def _time_calls(compute: Callable[[], object], timings: list[float], seconds: float) -> None:
    """Call for about so long, once at least, and add the seconds of each call."""
    for _ in _until(time.perf_counter() + seconds):
        begin = time.perf_counter()
        compute()
        timings.append(time.perf_counter() - begin)


def _until(deadline: float) -> Iterator[None]:
    """Yield once, and then until the clock says so."""
    yield
    while time.perf_counter() < deadline:
        yield
