"""ReaderTransport: reader threads that carry units from stores into page-aligned slots.

In front of an accelerator they stage through pinned memory and copy on a stream of its own, with
events both ways and no synchronization on the host.
"""

import contextlib
import os
import queue
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...vocabulary import Tier
from ..stores import NUM_READERS, PIECE_BYTES, MemoryStore, Store, aligned_buffer
from .transport import Left, Ticket, Unit

_Job = Ticket | None


class ReaderTransport:
    """Reads units from real stores."""

    def __init__(self, stores: Mapping[Tier, Store], device: torch.device) -> None:
        self._stores = stores
        self._device = device
        self._jobs = _Jobs()
        self._slots: dict[int, Tensor] = {}
        self._host_slots: dict[int, Tensor] = {}
        self._next_slot = 0
        self._stream = (
            torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            if device.type == "cuda"
            else None
        )
        self._in_slot: dict[int, Ticket] = {}
        self._used: dict[int, torch.cuda.Event] = {}
        self._staged: dict[int, torch.cuda.Event] = {}
        self._threads: list[threading.Thread] = []
        self._num_own_users = 0
        self._left: list[Left] = []
        """Former slots that others had views of."""
        self._link_seconds = 0.0
        self._last_ended = 0.0
        # The threads know the queue alone, so that a forgotten runtime is freed. They end before
        # the interpreter does: it would abort with a thread in the middle of a read.
        self._finish = weakref.finalize(self, _end_threads, self._jobs, self._threads, os.getpid())

    def make_slots(self, num_slots: int, slot_bytes: int) -> None:
        """Allocate slots in fast memory, and as many pinned ones where a disk feeds a device."""
        self._free_slots()
        for _ in range(num_slots):
            self.add_slot(slot_bytes)

    def another(self) -> "ReaderTransport":
        """Make one with slots and threads of its own."""
        return ReaderTransport(self._stores, self._device)

    def add_slot(self, num_bytes: int) -> int:
        """Allocate a slot in fast memory, and a pinned one where a disk feeds a device."""
        slot, self._next_slot = self._next_slot, self._next_slot + 1
        self._slots[slot] = self._allocate(num_bytes)
        self._num_own_users = _num_users(self._slots[slot])
        if self._stream is not None:
            # The allocator may have given us memory that kernels on the current stream still use.
            self.done_with(slot, shared=False)
            if any(not isinstance(store, MemoryStore) for store in self._stores.values()):
                self._host_slots[slot] = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        return slot

    def drop_slot(self, slot: int) -> None:
        """Free a slot, once nothing writes into it any more."""
        if (before := self._in_slot.pop(slot, None)) is not None:
            before.arrived.wait()
        if self._stream is not None:
            self._stream.synchronize()
        for kept in (self._slots, self._host_slots, self._used, self._staged):
            kept.pop(slot, None)

    def submit(self, unit: Unit, slot: int, *, urgent: bool = True) -> Ticket:
        """Queue the unit's pieces for the reader threads, or the copy on the stream."""
        assert unit.num_bytes <= self._slots[slot].numel(), "the plan's slots are too small"
        if (before := self._in_slot.get(slot)) is not None:
            before.arrived.wait()
        ticket = Ticket(unit, slot)
        store = ticket.store = self._stores[unit.tier]
        there = store.view(unit.key) if self._stream is not None else None
        if there is not None:
            self._copy(ticket, there[unit.offset : unit.offset + unit.num_bytes])
            ticket.ended = time.perf_counter()
            ticket.arrived.set()
            return ticket
        if self._stream is not None and slot in self._staged:
            self._staged.pop(slot).synchronize()  # the copy before has left the pinned slot
        target = (self._host_slots or self._slots)[slot][: unit.num_bytes]
        if self._stream is not None:
            ticket.finish = lambda: self._copy_staged(ticket, target)
        self._start_threads()
        for start in range(0, unit.num_bytes, PIECE_BYTES):
            ticket._pieces.append((unit.offset + start, target[start : start + PIECE_BYTES]))
        ticket._num_open = len(ticket._pieces)
        try:
            self._in_slot[slot] = ticket
            for _ in range(min(NUM_READERS, ticket._num_open)):
                self._jobs.put(ticket, urgent=urgent)
        except BaseException:  # KeyboardInterrupt: no thread may write into the slot any more
            unread = 0
            while ticket.take_piece() is not None:
                unread += 1
            if ticket.end_pieces(unread):
                ticket.arrived.set()
            ticket.arrived.wait()
            raise
        return ticket

    def wait(self, ticket: Ticket) -> Tensor | None:
        """Wait for the threads; a device is made to wait for its copy stream."""
        ticket.arrived.wait()
        if ticket.error is not None:
            raise ticket.error
        self._link_seconds += max(0.0, ticket.ended - max(ticket.asked, self._last_ended))
        self._last_ended = max(self._last_ended, ticket.ended)
        if self._stream is not None:
            assert ticket.copied is not None
            torch.cuda.current_stream(self._device).wait_event(ticket.copied)
        return self._slots[ticket.slot][: ticket.unit.num_bytes]

    def withdraw(self, ticket: Ticket) -> bool:
        """Let the threads pass it over, if none has begun with it."""
        if not ticket.withdraw():
            return False
        ticket.arrived.set()
        return True

    def has_arrived(self, ticket: Ticket) -> bool:
        """Say whether all bytes have been read."""
        return ticket.arrived.is_set()

    def done_with(self, slot: int, *, shared: bool) -> bool:
        """Let the copy stream know after which of the device's work a slot may be overwritten.

        A module may return its weight, or keep a view of it: that slot's memory is theirs then, and
        the slot gets memory of its own again.
        """
        kept = not shared or not self.is_lent(slot)
        if not kept:
            self._leave(slot)
            self._slots[slot] = self._allocate(self._slots[slot].numel())
        if self._stream is not None:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))
            self._used[slot] = event
        return kept

    def is_lent(self, slot: int) -> bool:
        """Say whether other tensors are views of a slot's memory."""
        return _num_users(self._slots[slot]) > self._num_own_users

    def left_bytes(self) -> int:
        """Return the memory of former slots of which views are left."""
        self._left = [left for left in self._left if not left.is_free]
        return sum(left.num_bytes for left in self._left)

    def _leave(self, slot: int) -> None:
        self._left.append(Left(self._slots[slot]))

    def slots(self) -> Sequence[Tensor]:
        """Return the slots, to measure them."""
        return list(self._slots.values())

    def take_link_seconds(self) -> float:
        """Return for how long there was something to read since the last call."""
        seconds, self._link_seconds = self._link_seconds, 0.0
        return seconds

    def close(self) -> None:
        """End the threads and free the slots."""
        self._finish()
        self._free_slots()

    def _free_slots(self) -> None:
        for ticket in self._in_slot.values():
            ticket.arrived.wait()
        if self._stream is not None:
            self._stream.synchronize()  # copies into the slots, and out of pinned memory
        for slot in self._slots:
            if self.is_lent(slot):
                self._leave(slot)
        for kept in (self._slots, self._host_slots, self._in_slot, self._used, self._staged):
            kept.clear()
        self._next_slot = 0

    def _allocate(self, num_bytes: int) -> Tensor:
        if self._stream is None:
            return aligned_buffer(num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def _copy(self, ticket: Ticket, source: Tensor) -> None:
        assert self._stream is not None
        with torch.cuda.stream(self._stream):
            if (used := self._used.pop(ticket.slot, None)) is not None:
                self._stream.wait_event(used)
            self._slots[ticket.slot][: len(source)].copy_(source, non_blocking=True)
            ticket.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ticket.copied.record(self._stream)

    def _copy_staged(self, ticket: Ticket, staged: Tensor) -> None:
        self._copy(ticket, staged)
        assert ticket.copied is not None
        self._staged[ticket.slot] = ticket.copied

    def _start_threads(self) -> None:
        while len(self._threads) < NUM_READERS:
            thread = threading.Thread(
                target=_read_pieces, args=(self._jobs,), daemon=True, name="tierhints-reader"
            )
            self._threads.append(thread)
            thread.start()


class _Jobs:
    """What reader threads have to do, first what is urgent.

    An interrupt in ``put`` leaves it whole: there may be more calls than jobs, or a job without a
    call, which is taken with the next one.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._urgent: deque[_Job] = deque()
        self._others: deque[_Job] = deque()

    def put(self, job: _Job, *, urgent: bool) -> None:
        """Add a job; None ends a thread."""
        (self._urgent if urgent else self._others).append(job)
        self._calls.put(None)

    def get(self) -> _Job:
        """Wait for a job."""
        while True:
            for jobs in (self._urgent, self._others):
                with contextlib.suppress(IndexError):
                    return jobs.popleft()
            self._calls.get()


def _read_pieces(jobs: _Jobs) -> None:
    """Read and check pieces until told to end; a failure is raised where the unit is waited for."""
    while (ticket := jobs.get()) is not None:
        while (piece := ticket.take_piece()) is not None:
            start, target = piece
            try:
                if ticket.error is None:
                    assert ticket.store is not None
                    ticket.store.read_into(ticket.unit.key, start, target)
            except BaseException as error:
                ticket.error = error
                _free_frames(error)
            del piece, target  # views of the slot, which must not be taken for a caller's
            if ticket.end_pieces(1):
                try:
                    if ticket.error is None and ticket.finish is not None:
                        ticket.finish()
                except BaseException as error:
                    ticket.error = error
                ticket.finish = None
                ticket.ended = time.perf_counter()
                ticket.arrived.set()
        del ticket


def _free_frames(error: BaseException | None) -> None:
    """Let go of what the frames of a failed read have: views of the slot, for as long as anybody
    keeps the error.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _end_threads(jobs: _Jobs, threads: list[threading.Thread], process: int) -> None:
    if os.getpid() != process:
        return  # a forked child, which has none of them
    for _ in threads:
        jobs.put(None, urgent=False)
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join()


def _num_users(buffer: Tensor) -> int:
    """Count the tensors on a buffer's memory (and its own handles, a constant)."""
    return int(torch._C._storage_Use_Count(buffer.untyped_storage()._cdata))
