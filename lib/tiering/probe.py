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
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import torch
from torch import Tensor

from ..errors import InputError
from ..hints import Tier
from ..machine import MachineProfile, TierSpec, fit_tier
from ..units import KIB, MIB, format_bytes
from .stores import (
    CHUNK_BYTES,
    NUM_READERS,
    PIECE_BYTES,
    FileStore,
    HostStore,
    MemoryStore,
    NumaStore,
    Store,
    aligned_buffer,
    far_nodes,
    memory_limit,
    total_memory,
)

UNIT_SIZES = (256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB)
_UNITS_UNDER_WAY = 2
"""Units asked for at a time: what a ring of staging slots keeps busy."""
_TIMED_BYTES = 32 * MIB
"""About what one timing reads, so that its start and end weigh little."""
_MAX_TIMED_UNITS = 16
_TURNS = 2
"""A computation is timed alone and beside reads in turns: machines drift."""
_MEMORY_UNITS = 4
"""Largest units held in memory while it is timed."""
_KEY = "0"


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


class Lane(Protocol):
    """A tier that can be timed."""

    tier: Tier
    name: str
    capacity_bytes: int | None

    def unit_seconds(self, unit_bytes: int) -> float:
        """Read several units of a size, a multiple of CHUNK_BYTES; returns the seconds per unit."""

    def close(self) -> None:
        """Free what is read."""


class ReaderLane:
    """Units that threads read from a store into host memory."""

    def __init__(
        self, store: Store, name: str, held_bytes: int, capacity_bytes: int | None = None
    ) -> None:
        self.tier, self.name, self.capacity_bytes = store.tier, name, capacity_bytes
        self._store = store
        self._starts = _Starts(held_bytes)
        self._slots: list[Tensor] = []
        store.put(_KEY, held_bytes, _random_bytes(held_bytes))
        self._readers = ThreadPoolExecutor(NUM_READERS)

    def unit_seconds(self, unit_bytes: int) -> float:
        """Keep the readers busy with units, each from where the last one ended."""
        if not self._slots or len(self._slots[0]) < unit_bytes:
            self._slots = [aligned_buffer(unit_bytes) for _ in range(_UNITS_UNDER_WAY)]
        num_units = _num_units(unit_bytes)
        under_way: deque[list[Future[None]]] = deque()
        begin = time.perf_counter()
        for index in range(num_units):
            if len(under_way) == _UNITS_UNDER_WAY:
                _wait(under_way.popleft())
            under_way.append(self._ask(unit_bytes, self._slots[index % _UNITS_UNDER_WAY]))
        while under_way:
            _wait(under_way.popleft())
        return (time.perf_counter() - begin) / num_units

    def close(self) -> None:
        """End the threads and close the store."""
        self._readers.shutdown()
        self._store.close()

    def _ask(self, unit_bytes: int, slot: Tensor) -> list[Future[None]]:
        start = self._starts.next(unit_bytes)
        return [
            self._readers.submit(
                self._store.read_into,
                _KEY,
                start + piece,
                slot[piece : min(piece + PIECE_BYTES, unit_bytes)],
            )
            for piece in range(0, unit_bytes, PIECE_BYTES)
        ]


class CopyLane:
    """Units that the compute device copies itself out of memory into its own."""

    def __init__(
        self,
        tier: Tier,
        name: str,
        source: Tensor,
        device: torch.device,
        largest: int,
        capacity_bytes: int | None,
        store: Store | None = None,
    ) -> None:
        self.tier, self.name, self.capacity_bytes = tier, name, capacity_bytes
        self._source, self._store = source, store
        self._target = torch.ones(largest, dtype=torch.uint8, device=device)
        self._starts = _Starts(len(source))
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def unit_seconds(self, unit_bytes: int) -> float:
        """Copy units one after the other; a CUDA device on a stream of its own."""
        num_units = _num_units(unit_bytes)
        target = self._target[:unit_bytes]
        begin = time.perf_counter()
        for _ in range(num_units):
            start = self._starts.next(unit_bytes)
            with torch.cuda.stream(self._stream):
                target.copy_(self._source[start : start + unit_bytes], non_blocking=True)
        if self._stream is not None:
            self._stream.synchronize()
        return (time.perf_counter() - begin) / num_units

    def close(self) -> None:
        """Let go of the buffers, and close the store."""
        self._source = self._target = torch.empty(0)
        if self._store is not None:
            self._store.close()


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


def open_lanes(
    device: torch.device,
    *,
    spill_dir: Path | None,
    file_bytes: int,
    largest: int,
    numa_node: int | None = None,
) -> list[Lane]:
    """Prepare the tiers of this machine: fast memory, host memory, a NUMA node without CPUs (or the
    one that is named) if there is one, and the disk. Memory is read out of four times the largest
    unit, so that caches don't answer.

    Without an accelerator fast memory and host memory are the same RAM: copies by all cores measure
    the one, reader threads the other.
    """
    cuda = device.type == "cuda"
    ram_bytes = min(filter(None, (total_memory(), memory_limit())), default=None)
    lanes: list[Lane] = []
    try:
        host = HostStore(pinned=cuda)
        lanes.append(_memory_lane(host, "RAM", device, largest, ram_bytes))
        name, fast_bytes, fast = "RAM", ram_bytes, host.view(_KEY)
        if cuda:
            name = torch.cuda.get_device_name(device)
            fast_bytes = torch.cuda.get_device_properties(device).total_memory
            fast = torch.ones(_MEMORY_UNITS * largest, dtype=torch.uint8, device=device)
        lanes.insert(0, CopyLane(Tier.HBM, name, fast, device, largest, fast_bytes))
        if numa_node is not None or far_nodes():
            node = NumaStore(numa_node, pinned=cuda)
            room = node.capacity_bytes()
            lanes.append(_memory_lane(node, f"NUMA node {node.node}", device, largest, room))
        disk = FileStore(spill_dir, temporary=True)
        name = "disk" if disk.direct else "disk, through the page cache"
        lanes.append(ReaderLane(disk, name, file_bytes, disk.capacity_bytes()))
    except BaseException:
        for lane in lanes:
            lane.close()
        raise
    return lanes


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


class _Starts:
    """Where units begin in what is held: one after the other, and again from the front."""

    def __init__(self, held_bytes: int) -> None:
        self._held_bytes, self._end = held_bytes, 0

    def next(self, unit_bytes: int) -> int:
        start = self._end if self._end + unit_bytes <= self._held_bytes else 0
        self._end = start + unit_bytes
        return start


def _memory_lane(
    store: MemoryStore, name: str, device: torch.device, largest: int, capacity_bytes: int | None
) -> Lane:
    held_bytes = _MEMORY_UNITS * largest
    if device.type != "cuda":
        return ReaderLane(store, name, held_bytes, capacity_bytes)
    store.put(_KEY, held_bytes, _random_bytes(held_bytes))
    source = store.view(_KEY)
    return CopyLane(store.tier, name, source, device, largest, capacity_bytes, store=store)


def _num_units(unit_bytes: int) -> int:
    return min(max(_TIMED_BYTES // unit_bytes, _UNITS_UNDER_WAY), _MAX_TIMED_UNITS)


def _wait(pieces: list[Future[None]]) -> None:
    for piece in pieces:
        piece.result()


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


def _random_bytes(num_bytes: int) -> Iterator[Tensor]:
    """Yield bytes that no disk can compress, and no generator of the caller's is used for."""
    generator = torch.Generator().manual_seed(0)
    for start in range(0, num_bytes, PIECE_BYTES):
        numbers = torch.empty(PIECE_BYTES // 8, dtype=torch.int64).random_(generator=generator)
        yield numbers.view(torch.uint8)[: num_bytes - start]
