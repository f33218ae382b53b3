"""Transports: what carries units from stores into slots of fast memory, in the order in which they
are asked for.

``ReaderTransport`` (readers.py) moves bytes; ``EmulatedTransport`` (emulation.py) lets the time
pass that hypothetical tiers would take. What an emulated machine charges beside transfers is in
``charges``.
"""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ...vocabulary import Tier
from ..stores import Store

_ARRIVAL_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Unit:
    """What one transfer moves: a range of a payload in a store. ``index`` counts a group's
    shards.
    """

    group: str
    index: int
    tier: Tier
    key: str
    offset: int
    num_bytes: int
    data_bytes: int


class Left:
    """Memory that was ours, for as long as others have views of it."""

    def __init__(self, memory: Tensor) -> None:
        self._storage = StorageWeakRef(memory.untyped_storage())  # type: ignore[no-untyped-call]
        self.num_bytes = memory.untyped_storage().nbytes()

    @property
    def is_free(self) -> bool:
        """Nobody has a view any more."""
        return bool(self._storage.expired())  # type: ignore[no-untyped-call]


class Transport(Protocol):
    """Carries units into slots, first come first served."""

    def make_slots(self, num_slots: int, slot_bytes: int) -> None:
        """Allocate the slots; nothing is allocated afterwards. Frees the ones before."""

    def another(self) -> "Transport":
        """Make one with slots of its own, which reads the same stores."""

    def add_slot(self, num_bytes: int) -> int:
        """Allocate one slot more, of a size of its own; returns its number."""

    def drop_slot(self, slot: int) -> None:
        """Free a slot that is not used any more."""

    def submit(self, unit: Unit, slot: int, *, urgent: bool = True) -> "Ticket":
        """Ask for a unit in a slot; returns at once. Not ``urgent``: behind all that is."""

    def wait(self, ticket: "Ticket") -> Tensor | None:
        """Block until the unit is there; returns its bytes in fast memory, or None where nothing
        really moved. Raises PlacementError where the bytes are not sound.
        """

    def withdraw(self, ticket: "Ticket") -> bool:
        """Give a unit up that has not begun to come; returns whether it had not."""

    def has_arrived(self, ticket: "Ticket") -> bool:
        """Say whether ``wait`` would return at once."""

    def done_with(self, slot: int, *, shared: bool) -> bool:
        """Say that what was computed with the slot's bytes has been asked of the device; returns
        whether they are still there.

        ``shared``: others than us have seen views of them, and may have kept one.
        """

    def is_lent(self, slot: int) -> bool:
        """Say whether other tensors are views of a slot's memory."""

    def left_bytes(self) -> int:
        """Return the memory of former slots of which views are left."""

    def slots(self) -> Sequence[Tensor]:
        """Return the slots, to measure them."""

    def take_link_seconds(self) -> float:
        """Return for how long units were on their way, those that went together counted once, since
        the last call.
        """

    def close(self) -> None:
        """Free the slots and end the threads."""


class Arrival:
    """A ``threading.Event`` that is set once, and that an interrupted wait leaves whole.

    Event guards itself by a lock of its own, which KeyboardInterrupt may leave locked for good.
    """

    __slots__ = ("_gate", "_there")

    def __init__(self) -> None:
        self._there = False
        self._gate = threading.Lock()
        self._gate.acquire()

    def is_set(self) -> bool:
        """Say whether it is there."""
        return self._there

    def set(self) -> None:
        """Let everybody go on who waits."""
        self._there = True
        with contextlib.suppress(RuntimeError):  # a second time
            self._gate.release()

    def wait(self) -> None:
        """Block until it is there."""
        while not self._there:
            # An interrupt may leave the gate in either state: hence the time limit.
            if self._gate.acquire(timeout=_ARRIVAL_SECONDS):
                self._gate.release()


@dataclass(slots=True, eq=False)
class Ticket:
    """A unit on its way, or arrived."""

    unit: Unit
    slot: int
    arrived: Arrival = field(default_factory=Arrival)
    error: BaseException | None = None
    copied: "torch.cuda.Event | None" = None
    due: float = 0.0
    """When an emulated transfer ends, on its transport's clock."""
    asked: float = field(default_factory=time.perf_counter)
    ended: float = 0.0
    """When it was asked for, and when its last byte had been read."""
    finish: Callable[[], None] | None = None
    """What the reader thread does once all bytes are in host memory."""
    store: Store | None = None
    is_withdrawn: bool = False
    """It was given up, and nothing of it was read."""
    _pieces: deque[tuple[int, Tensor]] = field(default_factory=deque)
    """(Start in the payload, target) of the reads that have not begun."""
    _num_open: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take_piece(self) -> tuple[int, Tensor] | None:
        """Return a read that is still to do."""
        with self._lock:
            return self._pieces.popleft() if self._pieces else None

    def withdraw(self) -> bool:
        """Leave nothing to read, if nothing is being read; returns whether that is so."""
        with self._lock:
            if not self.is_withdrawn and self._pieces and len(self._pieces) == self._num_open:
                self._pieces.clear()
                self.is_withdrawn = True
            return self.is_withdrawn

    def end_pieces(self, count: int) -> bool:
        """Say that so many reads are done; returns whether they were the last."""
        with self._lock:
            self._num_open -= count
            return self._num_open == 0
