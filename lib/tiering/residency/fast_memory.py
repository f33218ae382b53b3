"""Fast memory: the slots that units stream through, the working memory of compressed weights and
lookups, and what is taken beside them, never above the budget.
"""

import contextlib
import ctypes
import gc
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...codecs.kernels import Scratch
from ...errors import PlacementError
from ...policy.plan import Plan
from ...units import format_bytes
from ...vocabulary import Tier
from ..payload.layout import Payload, codec_scratch_bytes, lookup_bytes
from ..stores import aligned_buffer
from ..transfer.charges import Charges
from ..transfer.prefetch import Prefetcher
from ..transfer.transitions import TransitionLog
from ..transfer.transport import Left, Transport, Unit

_KEPT_COPIES = 8 * 2**20


class Watcher(Protocol):
    """Who runs the model: told of what happens outside the hooks of modules, and asked for room."""

    def alone(self) -> AbstractContextManager[None]:
        """Keep other threads from slots and scratch for as long as an operation has weights."""

    def moving(self, group: str) -> AbstractContextManager[Callable[[int], None]]:
        """Surround a transfer that no module's hook asked for; yields what is told its bytes."""

    def used(self, group: str) -> None:
        """Hear of a full use that comes from an operation and not from a module's hooks."""

    def called(self, group: str) -> None:
        """Hear of a use of an expert, which no module's hook sees."""

    def took(self, num_bytes: int) -> None:
        """Hear of fast memory taken (or, negative, given back) beside slots and residents."""

    def make_room(self, groups: Collection[str], whole: Collection[str]) -> None:
        """Carry out a plan with room for groups, and for whole parameters, at the same time.

        Raises PlacementError where the budget allows none, with the smallest that does.
        """

    def explain(self) -> str:
        """Say why no plan within the budget is enough, and which budget is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Want:
    """What an operation needs at the same time: units in slots, and bytes of expanded weights."""

    groups: frozenset[str]
    whole: frozenset[str]
    """Parameters that it needs as tensors."""
    units: frozenset[Unit]
    expanded_bytes: int


class FastMemory:
    """The compute device's memory, as far as it is ours. Used by one thread at a time."""

    def __init__(
        self, device: torch.device, transport: Transport, charges: Charges, watcher: Watcher
    ) -> None:
        self.device = device
        self.transport = transport
        self.charges = charges
        self.watcher = watcher
        self.transitions = TransitionLog()
        """What has moved, for good and through slots."""
        self.prefetcher = Prefetcher(transport, 0, [])
        self.scratch: Scratch | None = None
        """Working memory for compressed weights."""
        self.lookup = torch.empty(0, dtype=torch.uint8, device="cpu")
        """The buffer of lookups in embeddings that are away."""
        self.copy_device = device
        """Where copies go that callers keep."""
        self.extra_bytes = 0
        """What expanded weights take now."""
        self._limit: int | None = None
        self._planned_bytes = 0
        self._left: list[Left] = []
        """Expanded weights of which an operation has left views behind."""
        self._freed_copies = 0
        """What was freed of autocast's copies and not given back to the system yet."""

    @property
    def is_limited(self) -> bool:
        """The plan has a limit for it."""
        return self._limit is not None

    def free_slots(self) -> None:
        """Wait for what is on its way, and have no slots until ``adopt``."""
        self.prefetcher.drain()
        self.prefetcher = Prefetcher(self.transport, 0, [])
        self.transport.make_slots(0, 0)

    def make_working_memory(self, payloads: Iterable[Payload], away: Iterable[Payload]) -> None:
        """Allocate scratch for compressed weights, and the buffer of lookups in what is away."""
        num_bytes = codec_scratch_bytes(payloads)
        if not num_bytes:
            self.scratch = None
        elif self.scratch is None:
            self.scratch = Scratch(num_bytes, self.device)
        else:
            self.scratch.resize(num_bytes)
        size = max(map(lookup_bytes, away), default=0)
        if size != self.lookup.numel():
            self.lookup = torch.empty(0, dtype=torch.uint8, device="cpu")
            self.lookup = aligned_buffer(size) if size else self.lookup

    def adopt(self, plan: Plan, units: Sequence[Unit]) -> None:
        """Make the slots of a plan; ``units`` in the order of their likely use."""
        self.transport.make_slots(plan.num_slots, plan.slot_bytes)
        self.prefetcher = Prefetcher(
            self.transport,
            plan.num_slots,
            units,
            slot_bytes=plan.slot_bytes,
            log=self.transitions,
        )
        self._limit = plan.limit(Tier.HBM)
        self._planned_bytes = plan.fast_bytes - plan.expanded_bytes

    def ensure_room(self, look: Callable[[], Want]) -> bool:
        """Ask for a plan with room for what is wanted, where this one has none. Returns whether
        anything has moved for it: ``look`` says what is wanted as things are then.

        Raises PlacementError where the budget is too small, with the smallest that works.
        """
        want = look()
        if self._has_room(want):
            return False
        try:
            self.watcher.make_room(want.groups, want.whole)
        except PlacementError:
            gc.collect()  # frames of an interrupted forward may have views, in cycles
            self.watcher.make_room(want.groups, want.whole)
        if not self._has_room(look()):
            raise PlacementError(
                f"there is no room for offloaded weights of {', '.join(sorted(want.groups))} "
                f"beside what others have kept views of: {self.watcher.explain()}"
            )
        return True

    @contextlib.contextmanager
    def taking(self, num_bytes: int, expanded: Sequence[Left] = ()) -> Iterator[None]:
        """Take memory beside slots and residents; raises PlacementError above the budget. What
        others have views of then (``expanded``) stays taken for as long as they do.
        """
        spare = self._spare_bytes()
        if spare is not None and num_bytes > spare:
            raise PlacementError(
                f"{format_bytes(num_bytes)} of expanded weights would pass the HBM budget, "
                f"of which {format_bytes(max(spare, 0))} are left: give a larger one"
            )
        self._take(num_bytes)
        try:
            yield
        finally:
            self._left += expanded
            if not expanded:
                self._take(-num_bytes)
            self._sweep()

    def book_moment(self, num_bytes: int) -> None:
        """Book memory that an operation takes for itself, and that the plan has counted."""
        self._take(num_bytes)
        self._take(-num_bytes)

    def kept_bytes(self) -> int:
        """Return the memory of which only views that others have kept are left."""
        lent = len(self.prefetcher.lent) * self.prefetcher.slot_bytes
        return self.transport.left_bytes() + lent

    def buffers(self) -> list[Tensor]:
        """Return slots and the buffer of lookups, to measure them."""
        return [*self.transport.slots(), self.lookup]

    @contextlib.contextmanager
    def copies_on_host(self) -> Iterator[None]:
        """Read copies that callers keep into host memory: they may be the whole model."""
        self.copy_device = torch.device("cpu")
        try:
            yield
        finally:
            self.copy_device = self.device

    def give_back_copies(self, num_bytes: int) -> None:
        """Give autocast's freed copies back to the system from time to time: between small
        allocations malloc finds no place for the next one, and would take as much memory as all
        copies together.
        """
        self._freed_copies += num_bytes
        if self._freed_copies >= _KEPT_COPIES and self.device.type == "cpu":
            self._freed_copies = 0
            trim_heap()

    def _take(self, num_bytes: int) -> None:
        self.extra_bytes += num_bytes
        self.watcher.took(num_bytes)

    def _has_room(self, want: Want) -> bool:
        self._sweep()
        spare = self._spare_bytes()
        fits = spare is None or want.expanded_bytes <= spare
        return fits and self.prefetcher.has_room(want.units)

    def _spare_bytes(self) -> int | None:
        """Return what expanded weights may still take; None: any."""
        if self._limit is None:
            return None
        return self._limit - self._planned_bytes - self.extra_bytes - self.transport.left_bytes()

    def _sweep(self) -> None:
        """Give back the memory of expanded weights without any view left."""
        gone = sum(left.num_bytes for left in self._left if left.is_free)
        self._left = [left for left in self._left if not left.is_free]
        if gone:
            self._take(-gone)


def trim_heap() -> None:
    """Give freed memory back to the system: under a memory limit what malloc keeps counts as
    ours.
    """
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
