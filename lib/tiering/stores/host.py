"""Payloads in memory: host DRAM below an accelerator."""

import os
import threading
import weakref
from collections.abc import Iterable
from typing import ClassVar, Self

import torch
from torch import Tensor

from ...errors import PlacementError
from ...units import SECTOR_BYTES, format_bytes
from ...vocabulary import Tier
from .base import StoreOptions, aligned_buffer, check_range, lost, register_store
from .limits import available_memory


class MemoryStore:
    """What the stores in memory share. A payload takes whole pages and no more; ``pinned`` ones are
    registered with CUDA, because torch's own pinned memory is rounded up to powers of two.
    """

    tier: ClassVar[Tier]

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._payloads: dict[str, Tensor] = {}
        self._lock = threading.Lock()
        self._cleanup = weakref.finalize(self, _free_all, self._payloads, pinned, os.getpid())
        self._cleanup.atexit = False

    @classmethod
    def open(cls, options: StoreOptions) -> Self:
        """Make a store, pinned where an accelerator copies from it."""
        return cls(pinned=options.pinned)

    def has(self, key: str) -> bool:
        """Say whether a payload is held."""
        return key in self._payloads

    def put(self, key: str, num_bytes: int, parts: Iterable[Tensor]) -> None:
        """Copy the parts to memory of this tier."""
        if not self._cleanup.alive:
            raise lost(key)
        if key in self._payloads:
            return
        assert num_bytes > 0 and num_bytes % SECTOR_BYTES == 0, num_bytes
        room = self.capacity_bytes()
        if num_bytes > room:
            raise PlacementError(
                f"payload {key} needs {format_bytes(num_bytes)} of {self.tier} memory, of which "
                f"{format_bytes(room)} are left: give the {self.tier} tier a smaller budget"
            )
        payload = self._allocate(num_bytes)
        filled = 0
        for part in parts:
            payload[filled : filled + len(part)].copy_(part)
            filled += len(part)
        assert filled == num_bytes, (filled, num_bytes)
        self._verify(key, payload)
        if self._pinned:
            _pin(payload)
        with self._lock:
            self._payloads[key] = payload

    def num_bytes(self, key: str) -> int:
        """Return a payload's length."""
        return len(self.view(key))

    def read_into(self, key: str, start: int, out: Tensor) -> None:
        """Copy bytes out of memory, which needs no checksum."""
        payload = self.view(key)
        check_range(len(payload), start, out)
        out.copy_(payload[start : start + len(out)])

    def view(self, key: str) -> Tensor:
        """Return the payload itself."""
        payload = self._payloads.get(key)
        if payload is None:
            raise lost(key)
        return payload

    def free(self, key: str) -> None:
        """Drop a payload. Copies from it to a device must have ended."""
        with self._lock:
            payload = self._payloads.pop(key, None)
        if payload is not None and self._pinned:
            _unpin(payload)

    def close(self) -> None:
        """Drop all payloads. Copies from them to a device must have ended."""
        self._cleanup()

    def capacity_bytes(self) -> int:
        """Return the memory that this process can still take."""
        return available_memory()

    def _allocate(self, num_bytes: int) -> Tensor:
        return aligned_buffer(num_bytes)

    def _verify(self, key: str, payload: Tensor) -> None:
        """Check that a filled payload lies where it should."""


@register_store
class HostStore(MemoryStore):
    """Host DRAM; ``pinned`` below a CUDA device, so that copies to it are asynchronous."""

    tier: ClassVar[Tier] = Tier.CPU


def _pin(payload: Tensor) -> None:
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    status = int(runtime.cudaHostRegister(payload.data_ptr(), len(payload), 1))
    if status != 0:
        raise PlacementError(
            f"CUDA can't pin {format_bytes(len(payload))} of host memory (error {status}): raise "
            "the limit of locked memory (ulimit -l), or give the tier a smaller budget"
        )


def _unpin(payload: Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(payload.data_ptr())  # type: ignore[no-untyped-call]


def _free_all(payloads: dict[str, Tensor], pinned: bool, owner: int) -> None:
    while payloads:
        _, payload = payloads.popitem()
        if pinned and os.getpid() == owner:  # a forked child has no CUDA
            _unpin(payload)
