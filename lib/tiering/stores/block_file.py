"""The block file: one payload on a disk, with a checksum (xxh3, 64 bits) for each chunk.

    page 0          magic, format version, chunk size, payload size, key, checksum of the table;
                    checksum of all that
    pages 1 ...     table: the checksum of each chunk, 8 bytes each, padded to whole pages
    then            payload, a multiple of SECTOR_BYTES

Numbers are little-endian. The header is written last: a file that was cut off has no header.
Nothing of a file is used before the checksum over it is compared; what is wrong is a ``Damage``.
"""

import array
import os
import struct
import sys
import weakref
from pathlib import Path

import xxhash

from ...files import drop_cached_pages
from ...units import SECTOR_BYTES
from .base import CHUNK_BYTES, aligned_buffer, byte_view

_MAGIC = b"TIERBLK\n"
_VERSION = 1
_FIELDS = struct.Struct("<8sIIQ128sQ")
_CHECKSUM = struct.Struct("<Q")


class Damage(Exception):
    """What is wrong with a file, in words that follow its name."""


def header_bytes(num_bytes: int) -> int:
    """Return where the payload starts."""
    return SECTOR_BYTES + _table_bytes(num_bytes)


def chunk_checksums(data: memoryview) -> list[int]:
    """Return the checksum of each chunk of ``data``; the last one may be short."""
    return [
        xxhash.xxh3_64_intdigest(data[start : start + CHUNK_BYTES])
        for start in range(0, len(data), CHUNK_BYTES)
    ]


def pack_header(key: str, num_bytes: int, checksums: list[int]) -> bytes:
    """Return the pages in front of the payload."""
    table = _pack_table(checksums).ljust(_table_bytes(num_bytes), b"\0")
    fields = _FIELDS.pack(
        _MAGIC, _VERSION, CHUNK_BYTES, num_bytes, key.encode(), xxhash.xxh3_64_intdigest(table)
    )
    page = fields + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(fields))
    return page.ljust(SECTOR_BYTES, b"\0") + table


class BlockFile:
    """A file whose header is sound, open for reading. Closed when nothing refers to it any more, so
    that a reader may finish while the store drops it.
    """

    def __init__(self, path: Path, key: str, *, direct: bool) -> None:
        """Open a file; raises OSError where that fails, Damage where it isn't the key's payload."""
        self.path, self._direct = path, direct
        self._descriptor = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
        weakref.finalize(self, os.close, self._descriptor).atexit = False
        size = os.fstat(self._descriptor).st_size
        page = byte_view(aligned_buffer(SECTOR_BYTES))
        if size < SECTOR_BYTES:
            raise Damage(f"has {size} bytes, less than a header (truncated)")
        self._read(0, page)
        self.num_bytes, table_checksum = _parse_fields(page, key)
        self._start = header_bytes(self.num_bytes)
        if size != self._start + self.num_bytes:
            cut = "truncated" if size < self._start + self.num_bytes else "too long"
            raise Damage(f"has {size} of {self._start + self.num_bytes} bytes ({cut})")
        table = byte_view(aligned_buffer(_table_bytes(self.num_bytes)))
        self._read(SECTOR_BYTES, table)
        if xxhash.xxh3_64_intdigest(table) != table_checksum:
            raise Damage("has a damaged header (its table of checksums fails its own)")
        self._checksums = _parse_table(table, -(-self.num_bytes // CHUNK_BYTES))

    def read_chunks(self, start: int, out: memoryview) -> None:
        """Fill ``out`` with the payload's bytes from ``start`` on, and check them; raises OSError
        or Damage. Any number of threads may be in here.
        """
        self._read(self._start + start, out)
        first = start // CHUNK_BYTES
        for index, checksum in enumerate(chunk_checksums(out), first):
            if checksum != self._checksums[index]:
                raise Damage(
                    f"fails its checksum (bytes changed on disk, in payload bytes "
                    f"{index * CHUNK_BYTES} to {min((index + 1) * CHUNK_BYTES, self.num_bytes)})"
                )

    def read_unchecked(self, start: int, out: memoryview) -> None:
        """Fill ``out`` with bytes from ``start`` on, in whole sectors, which the caller checks;
        raises OSError or Damage.
        """
        self._read(self._start + start, out)

    def _read(self, offset: int, out: memoryview) -> None:
        filled = 0
        while filled < len(out):
            count = os.preadv(self._descriptor, [out[filled:]], offset + filled)
            if count == 0:
                raise Damage(f"ends at byte {offset + filled} (truncated)")
            filled += count
        if not self._direct:
            drop_cached_pages(self._descriptor, offset, len(out))


def _parse_fields(page: memoryview, key: str) -> tuple[int, int]:
    """Return the payload's size and the checksum of the table."""
    fields = page[: _FIELDS.size]
    magic, version, chunk_bytes, num_bytes, stored_key, table_checksum = _FIELDS.unpack(fields)
    if magic != _MAGIC:
        raise Damage("does not begin like a block file (another file, or a damaged header)")
    if version != _VERSION:
        raise Damage(f"has format version {version}, and this program reads {_VERSION}")
    (checksum,) = _CHECKSUM.unpack(page[_FIELDS.size : _FIELDS.size + _CHECKSUM.size])
    if checksum != xxhash.xxh3_64_intdigest(fields):
        raise Damage("has a damaged header (it fails its checksum)")
    stored_key = stored_key.rstrip(b"\0").decode()
    if stored_key != key:
        raise Damage(f"holds another payload ({stored_key})")
    if chunk_bytes != CHUNK_BYTES:
        raise Damage(f"has checksums of {chunk_bytes} bytes, and this program reads {CHUNK_BYTES}")
    return num_bytes, table_checksum


def _table_bytes(num_bytes: int) -> int:
    table = -(-num_bytes // CHUNK_BYTES) * _CHECKSUM.size
    return -(-table // SECTOR_BYTES) * SECTOR_BYTES


def _pack_table(checksums: list[int]) -> bytes:
    table = array.array("Q", checksums)
    if sys.byteorder == "big":
        table.byteswap()
    return table.tobytes()


def _parse_table(table: memoryview, num_chunks: int) -> "array.array[int]":
    checksums = array.array("Q", bytes(table[: num_chunks * _CHECKSUM.size]))
    if sys.byteorder == "big":
        checksums.byteswap()
    return checksums
