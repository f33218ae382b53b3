"""Lanes: one tier each, read as the runtime reads it."""

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ...units import MIB
from ...vocabulary import Tier
from ..stores import (
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

_UNITS_UNDER_WAY = 2
"""Units asked for at a time: what a ring of staging slots keeps busy."""


_TIMED_BYTES = 32 * MIB
"""Bytes that one timing reads, about, so that its start and end weigh little."""


_MAX_TIMED_UNITS = 16


_MEMORY_UNITS = 4
"""Largest units held in memory while it is timed."""


_KEY = "0"


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


def _random_bytes(num_bytes: int) -> Iterator[Tensor]:
    """Yield bytes that no disk can compress, without using the caller's random generators."""
    generator = torch.Generator().manual_seed(0)
    for start in range(0, num_bytes, PIECE_BYTES):
        numbers = torch.empty(PIECE_BYTES // 8, dtype=torch.int64).random_(generator=generator)
        yield numbers.view(torch.uint8)[: num_bytes - start]
