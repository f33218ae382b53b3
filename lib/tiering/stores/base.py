"""What every store is: a place outside fast memory that holds payloads, flat runs of bytes, by key.

A store knows bytes, not modules. Weights don't change while a runtime is attached, so a payload is
written once and never copied back. A registered store serves its tier in real mode
(docs/extending.md); tests/unit/tiering/stores/test_byte_stores.py is the suite that every one
passes.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol, Self, TypeVar

import torch
from torch import Tensor

from ...errors import PlacementError
from ...files import page_memory
from ...registry import Registry
from ...vocabulary import Tier

if TYPE_CHECKING:
    from .records import KeptRecords
    from .residuals import Known

CHUNK_BYTES = 256 * 2**10
"""Bytes that one checksum covers. A read starts at a multiple of it."""
PIECE_BYTES = 4 * 2**20
"""Bytes that one call reads or writes: larger ones are not faster, and leave a reader idle for
longer at the end of a unit.
"""
NUM_READERS = 2
"""Threads that read at a time: while one checks its piece, the other keeps the disk busy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreOptions:
    """What ``attach`` knows when a store is opened. ``device``: where the model computes;
    ``folder``: the ``spill_dir``, None where none was given; ``records``: a checkpoint's, kept in
    files that needn't be written again; ``known``: what is written as residuals.
    """

    device: torch.device
    folder: Path | None = None
    records: "KeptRecords | None" = None
    known: "Known | None" = None

    @property
    def pinned(self) -> bool:
        """Whether copies to the device are asynchronous from page-locked memory only."""
        return self.device.type == "cuda"


class Store(Protocol):
    """Holds payloads of one tier. Several threads may read at a time; one writes."""

    tier: ClassVar[Tier]

    @classmethod
    def open(cls, options: StoreOptions) -> Self:
        """Make the tier's store of one runtime, when the first payload goes there; raises
        InputError where this machine has no such tier.
        """

    def has(self, key: str) -> bool:
        """Say whether a payload is held that can be read."""

    def put(self, key: str, num_bytes: int, parts: Iterable[Tensor]) -> None:
        """Keep a copy of the parts (1-D uint8 tensors in host memory, in order, together
        ``num_bytes``, a multiple of SECTOR_BYTES); takes none where the key is held already. A part
        may be overwritten once the next one is asked for.

        Returns once the bytes are safe. Raises PlacementError where they have no room; nothing is
        held then.
        """

    def num_bytes(self, key: str) -> int:
        """Return a payload's length; raises PlacementError like ``read_into``."""

    def read_into(self, key: str, start: int, out: Tensor) -> None:
        """Fill ``out`` (1-D uint8, contiguous, on page-aligned host memory) with a payload's bytes
        from ``start`` on, and check them.

        ``start`` is a multiple of CHUNK_BYTES; the length is one too, or reaches the payload's end.
        Raises PlacementError where the bytes are not sound; ``out`` must not be used then.
        """

    def view(self, key: str) -> Tensor | None:
        """Return a payload's bytes where they lie, read-only for the caller; None where that
        isn't memory.
        """

    def free(self, key: str) -> None:
        """Give a payload's room back; does nothing for a key that isn't held."""

    def close(self) -> None:
        """Give everything back; the store can't be used afterwards."""

    def capacity_bytes(self) -> int:
        """Measure how much more could be put here now."""


STORES: Registry[type[Store]] = Registry("store of tier")
"""By tier: what real mode serves, fast memory apart."""
StoreClass = TypeVar("StoreClass", bound=type[Store])


def register_store(store: StoreClass) -> StoreClass:
    """Let a class serve its ``tier`` in real mode: a decorator."""
    STORES.add(Tier(store.tier), store)
    return store


def served_tiers() -> frozenset[Tier]:
    """Return the tiers that real mode has: fast memory, and those with a registered store."""
    return frozenset({Tier.HBM, *map(Tier, STORES)})


def aligned_buffer(num_bytes: int) -> Tensor:
    """Return zeroed host memory (1-D uint8) that starts on a page: see ``page_memory``."""
    return torch.frombuffer(page_memory(num_bytes), dtype=torch.uint8)


def byte_view(buffer: Tensor) -> memoryview:
    """Return the memory of a contiguous 1-D uint8 tensor, without a copy."""
    assert buffer.dtype == torch.uint8 and buffer.dim() == 1 and buffer.is_contiguous()
    return memoryview(buffer.detach().numpy())  # type: ignore[arg-type]


def check_range(num_bytes: int, start: int, out: Tensor) -> None:
    """Check what ``read_into`` asks of its caller."""
    end = start + len(out)
    assert start % CHUNK_BYTES == 0, start
    assert end == num_bytes or (end < num_bytes and len(out) % CHUNK_BYTES == 0), (start, end)


def lost(key: str) -> PlacementError:
    """Make the error for a payload that the store doesn't hold."""
    return PlacementError(
        f"payload {key} is lost: it was freed, or its store is closed; load the model again"
    )
