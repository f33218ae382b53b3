"""Payloads in files as residuals: what records in fast memory lack of them.

A file is a block file whose payload is

    head      payload bytes, number of chunks; where the head ends, and each chunk; the checksum of
              each chunk's bytes as they are decoded: 8 bytes each, little-endian
    chunks    as ``codecs.residuals`` has them, padded to a whole sector

A chunk is read without the block file's own checksums, which cover other bytes: that of what it
decodes to covers all that went into it.
"""

import array
import queue
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from ...codecs import residuals
from ...codecs.residuals import Residuals, coded_bytes, stream_bytes
from ...errors import PlacementError
from ...units import SECTOR_BYTES
from ...vocabulary import Tier
from .base import CHUNK_BYTES, NUM_READERS, StoreOptions, aligned_buffer, byte_view, check_range
from .block_file import Damage, chunk_checksums
from .file import FileStore

assert residuals.CHUNK_BYTES == CHUNK_BYTES
_PART_BYTES = 4 * CHUNK_BYTES
"""Bytes of a payload that are decoded at a time."""
_BUFFER_BYTES = stream_bytes(coded_bytes(_PART_BYTES) + 2 * SECTOR_BYTES)
STAGING_BYTES = (NUM_READERS + 1) * _BUFFER_BYTES
"""Memory in which chunks lie while they are decoded: for each reader, and who else asks."""


class Known(Protocol):
    """Says what fast memory knows of payloads; a key says by which records."""

    def find(self, key: str) -> Residuals | None:
        """Return how a payload is coded; None: as it is."""


@dataclass(frozen=True, slots=True)
class _Head:
    num_bytes: int
    ends: "array.array[int]"
    checksums: "array.array[int]"


class ResidualStore:
    """A file store that holds what is ``known`` as residuals."""

    tier: ClassVar[Tier] = Tier.SSD

    def __init__(self, files: FileStore, known: Known) -> None:
        self._files = files
        self._known = known
        self._heads: dict[str, _Head] = {}
        self._buffers: queue.LifoQueue[Tensor] = queue.LifoQueue()
        for _ in range(NUM_READERS + 1):
            self._buffers.put(aligned_buffer(_BUFFER_BYTES))

    @classmethod
    def open(cls, options: StoreOptions) -> Self:
        """Make one on the file store of the same options."""
        assert options.known is not None
        return cls(FileStore.open(options), options.known)

    def has(self, key: str) -> bool:
        """Say whether there is a file with a sound header for the key."""
        return self._files.has(key)

    def put(self, key: str, num_bytes: int, parts: Iterable[Tensor]) -> None:
        """Code a payload, compare what it decodes to, and write its file: see ``FileStore.put``."""
        if (how := self._known.find(key)) is None:
            self._files.put(key, num_bytes, parts)
            return
        if self._holds(key, num_bytes):
            return
        self._heads.pop(key, None)
        self._files.remove(key)
        self._files.check_room(key, num_bytes)
        with self._files.explained(key, num_bytes):
            spool = tempfile.TemporaryFile(buffering=0, dir=self._files.folder)
        with spool:
            sizes: list[int] = []
            checksums: list[int] = []
            start = 0
            for piece in _pieces(parts):
                for chunk in how.encode(piece, start):
                    with self._files.explained(key, num_bytes):
                        _write_all(spool, byte_view(chunk))
                    sizes.append(len(chunk))
                checksums += chunk_checksums(byte_view(piece))
                start += len(piece)
            assert start == num_bytes, (start, num_bytes)
            head = _pack_head(num_bytes, sizes, checksums)
            spool.seek(0)
            total = -(-(len(head) + sum(sizes)) // SECTOR_BYTES) * SECTOR_BYTES
            self._files.put(key, total, _file_parts(head, spool, total))

    def num_bytes(self, key: str) -> int:
        """Return a payload's length."""
        if self._known.find(key) is None:
            return self._files.num_bytes(key)
        return self._head(key).num_bytes

    def read_into(self, key: str, start: int, out: Tensor) -> None:
        """Read, decode and check bytes."""
        if (how := self._known.find(key)) is None:
            self._files.read_into(key, start, out)
            return
        head = self._head(key)
        check_range(head.num_bytes, start, out)
        buffer = self._buffers.get()
        try:
            for first in range(0, len(out), _PART_BYTES):
                part = out[first : first + _PART_BYTES]
                self._decode(key, how, head, start + first, part, buffer)
        finally:
            self._buffers.put(buffer)

    def view(self, key: str) -> Tensor | None:
        """Return None: a file's bytes aren't in memory."""
        return None

    def free(self, key: str) -> None:
        """Give a payload's room back where the folder is temporary."""
        self._heads.pop(key, None)
        self._files.free(key)

    def close(self) -> None:
        """Close all files; a temporary folder is removed."""
        self._heads.clear()
        self._files.close()

    def capacity_bytes(self) -> int:
        """Return the free bytes of the disk."""
        return self._files.capacity_bytes()

    def _holds(self, key: str, num_bytes: int) -> bool:
        """Say whether there is a file with sound heads for so many bytes."""
        try:
            return self.num_bytes(key) == num_bytes
        except PlacementError:
            return False

    def _head(self, key: str) -> _Head:
        if (head := self._heads.get(key)) is None:
            with self._files.reading(key) as file:
                buffer = aligned_buffer(min(CHUNK_BYTES, file.num_bytes))
                file.read_chunks(0, byte_view(buffer))
                words = _words(buffer[:16])
                length = 8 * (3 + 2 * words[1])
                if length > len(buffer):
                    chunks = -(-length // CHUNK_BYTES) * CHUNK_BYTES
                    buffer = aligned_buffer(min(chunks, file.num_bytes))
                    file.read_chunks(0, byte_view(buffer))
                if length > len(buffer):
                    raise Damage("does not hold residuals")
                words = _words(buffer[:length])
            count = words[1]
            head = _Head(words[0], words[2 : count + 3], words[count + 3 :])
            self._heads[key] = head
        return head

    def _decode(
        self, key: str, how: Residuals, head: _Head, start: int, out: Tensor, buffer: Tensor
    ) -> None:
        first = start // CHUNK_BYTES
        last = first + -(-len(out) // CHUNK_BYTES)
        ends = head.ends[first : last + 1]
        low = ends[0] // SECTOR_BYTES * SECTOR_BYTES
        high = -(-ends[-1] // SECTOR_BYTES) * SECTOR_BYTES
        with self._files.reading(key) as file:
            file.read_unchecked(low, byte_view(buffer[: high - low]))
            bad = how.decode(buffer, [end - low for end in ends], start, out)
            found = [] if bad is not None else chunk_checksums(byte_view(out))
            if found != list(head.checksums[first:last]):
                raise Damage(
                    "fails its checksums (bytes changed on disk or in memory, of payload bytes "
                    f"{start} to {start + len(out)})"
                )


def _write_all(file: Any, data: memoryview) -> None:
    while len(data):
        data = data[file.write(data) :]


def _pieces(parts: Iterable[Tensor]) -> Iterator[Tensor]:
    """Cut the parts into pieces of _PART_BYTES, all in one buffer, one after the other."""
    buffer, filled = torch.empty(_PART_BYTES, dtype=torch.uint8, device="cpu"), 0
    for part in parts:
        taken = 0
        while taken < len(part):
            count = min(len(part) - taken, _PART_BYTES - filled)
            buffer[filled : filled + count] = part[taken : taken + count]
            taken, filled = taken + count, filled + count
            if filled == _PART_BYTES:
                yield buffer
                filled = 0
    if filled:
        yield buffer[:filled]


def _pack_head(num_bytes: int, sizes: list[int], checksums: list[int]) -> bytes:
    end = 8 * (3 + 2 * len(sizes))
    ends = [end]
    for size in sizes:
        ends.append(end := end + size)
    words = array.array("Q", [num_bytes, len(sizes), *ends, *checksums])
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()


def _words(buffer: Tensor) -> "array.array[int]":
    words = array.array("Q", bytes(byte_view(buffer)))
    if sys.byteorder == "big":
        words.byteswap()
    return words


def _file_parts(head: bytes, spool: Any, total: int) -> Iterator[Tensor]:
    """Yield the head, what was spooled, and the padding."""
    yield torch.frombuffer(bytearray(head), dtype=torch.uint8)
    left = total - len(head)
    while data := spool.read(_PART_BYTES):
        left -= len(data)
        yield torch.frombuffer(bytearray(data), dtype=torch.uint8)
    yield torch.zeros(left, dtype=torch.uint8, device="cpu")
