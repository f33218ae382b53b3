"""Payloads in files: one per payload, read past the page cache, checked on every read.

Keys say what is in a payload, so a folder may be shared by models and by runs, and what an earlier
run wrote is used again. A file is written under another name, flushed, and renamed: there is never
half of one under its own name, and of two writers the last one wins with the same bytes. Where
nobody needs it after a power failure it isn't flushed: its checksums would tell.
"""

import contextlib
import errno
import os
import re
import resource
import shutil
import threading
import warnings
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

import numpy
from torch import Tensor

from ...errors import PlacementError
from ...files import drop_cached_pages
from ...units import SECTOR_BYTES, format_bytes
from ...vocabulary import Tier
from .base import (
    PIECE_BYTES,
    StoreOptions,
    aligned_buffer,
    byte_view,
    check_range,
    lost,
    register_store,
)
from .block_file import (
    BlockFile,
    Damage,
    chunk_checksums,
    header_bytes,
    pack_header,
)
from .folders import (
    accepts_direct_io,
    create_partial,
    default_spill_folder,
    make_temporary_folder,
    open_folder,
    remove_temporary_folder,
)

if TYPE_CHECKING:
    from .records import KeptRecords

SUFFIX = ".block"
_KEY = re.compile(r"[0-9a-f]{1,128}")
_MOST_OPEN_FILES = 4096
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@register_store
class FileStore:
    """A folder of block files, which stays for the next run; ``temporary``, or with ``folder``
    None, a new one inside it, removed when the store is closed, at exit, or by the next such store
    after the process was killed. ``durable``: what is put survives a power failure.

    Reads by several threads run at the same time: no lock is held while the disk works, and bytes
    go straight into the caller's memory. Raises InputError where the folder can't be written or is
    memory.
    """

    tier: ClassVar[Tier] = Tier.SSD

    def __init__(
        self,
        folder: Path | None,
        *,
        temporary: bool = False,
        durable: bool = True,
        records: "KeptRecords | None" = None,
    ) -> None:
        self._remove = None
        if folder is None or temporary:
            self.folder, lock = make_temporary_folder((folder or default_spill_folder()).absolute())
            self._remove = weakref.finalize(
                self, remove_temporary_folder, self.folder, lock, os.getpid()
            )
        else:
            self.folder = open_folder(folder.absolute())
        self.direct = accepts_direct_io(self.folder)
        # Through the page cache a flush is also what keeps files from being memory.
        self._flushes = not self.direct or (durable and self._remove is None)
        if not self.direct:
            warnings.warn(
                f"the file system of {self.folder} has no direct reads: block files are read "
                "through the page cache, and dropped from it at once",
                stacklevel=2,
            )
        self._records = records
        """What is kept there is read there, and not written here."""
        self._files: dict[str, BlockFile] = {}
        """Open files, the least recently used first."""
        self._max_open = _max_open_files()
        self._lock = threading.Lock()
        self._closed = False

    @classmethod
    def open(cls, options: StoreOptions) -> Self:
        """Make a store in the spill folder, or in a temporary one."""
        return cls(options.folder, records=options.records)

    def has(self, key: str) -> bool:
        """Say whether there is a file with a sound header for the key."""
        try:
            self.find(key)
        except PlacementError:
            return False
        return True

    def put(self, key: str, num_bytes: int, parts: Iterable[Tensor]) -> None:
        """Write a file, past the page cache, unless there is one; a damaged one is replaced.

        Raises PlacementError where the disk is full or fails, and leaves no partial file.
        """
        assert num_bytes > 0 and num_bytes % SECTOR_BYTES == 0, num_bytes
        if self.has(key) and self.num_bytes(key) == num_bytes:
            return
        if self._closed:
            raise lost(key)
        file_bytes = header_bytes(num_bytes) + num_bytes
        self.check_room(key, file_bytes)
        with self.explained(key, file_bytes):
            partial, lock = create_partial(self.folder, key)
        try:
            self._write(partial, key, num_bytes, parts)
            with self.explained(key, file_bytes):
                partial.replace(self.path(key))
                if self._flushes:
                    _flush_folder(self.folder)
        finally:
            partial.unlink(missing_ok=True)
            os.close(lock)
        self._forget(key)

    def check_room(self, key: str, file_bytes: int) -> None:
        """Raise PlacementError where the disk has no room for so many bytes."""
        room = self.capacity_bytes()
        if file_bytes > room:
            raise self._no_room(key, file_bytes, room)

    def num_bytes(self, key: str) -> int:
        """Return a payload's length, from its header."""
        return self.find(key).num_bytes

    def read_into(self, key: str, start: int, out: Tensor) -> None:
        """Read and check bytes, straight into the tensor's memory."""
        with self.reading(key) as file:
            check_range(file.num_bytes, start, out)
            assert out.data_ptr() % SECTOR_BYTES == 0, "direct reads need page-aligned memory"
            file.read_chunks(start, byte_view(out))

    @contextlib.contextmanager
    def reading(self, key: str) -> Iterator[BlockFile]:
        """Find a key's file; what goes wrong with it is a PlacementError."""
        file = self.find(key)
        try:
            yield file
        except Damage as damage:
            raise _damaged(key, file.path, damage) from damage
        except OSError as error:
            raise _unreadable(key, file.path, error) from error

    def view(self, key: str) -> None:
        """Return None: a file's bytes aren't in memory."""
        return None

    def free(self, key: str) -> None:
        """Close a file, and remove it where the folder is temporary: no other is ours alone."""
        if self._remove is not None:
            self.remove(key)
        else:
            self._forget(key)

    def remove(self, key: str) -> None:
        """Close a file, and remove it."""
        self._forget(key)
        self.path(key).unlink(missing_ok=True)

    def close(self) -> None:
        """Close all files; a temporary folder is removed."""
        self._closed = True
        with self._lock:
            self._files.clear()
        if self._remove is not None:
            self._remove()

    def capacity_bytes(self) -> int:
        """Return the free bytes of the disk."""
        return shutil.disk_usage(self.folder).free

    def path(self, key: str) -> Path:
        """Return where a payload's file is, or would be."""
        assert _KEY.fullmatch(key), key
        return self.folder / f"{key}{SUFFIX}"

    def find(self, key: str) -> BlockFile:
        """Return the open file of a key; opens it outside the lock if need be. Raises
        PlacementError where there is none, or none that is sound.
        """
        with self._lock:
            file = self._files.pop(key, None)
            if file is not None:
                self._files[key] = file
                return file
        if self._closed:
            raise lost(key)
        if self._records is not None and (kept := self._records.find(key)) is not None:
            return kept
        path = self.path(key)
        try:
            file = BlockFile(path, key, direct=self.direct)
        except Damage as damage:
            raise _damaged(key, path, damage) from damage
        except OSError as error:
            raise _unreadable(key, path, error) from error
        with self._lock:
            while len(self._files) >= self._max_open:
                del self._files[next(iter(self._files))]
            return self._files.setdefault(key, file)

    def _forget(self, key: str) -> None:
        with self._lock:
            self._files.pop(key, None)

    def _write(self, path: Path, key: str, num_bytes: int, parts: Iterable[Tensor]) -> None:
        """Write the payload, then the header."""
        start = header_bytes(num_bytes)
        with self.explained(key, start + num_bytes):
            descriptor = os.open(path, os.O_WRONLY | (os.O_DIRECT if self.direct else 0))
        try:
            checksums: list[int] = []
            written = 0
            for piece in _pieces(parts):
                checksums += chunk_checksums(piece)
                with self.explained(key, start + num_bytes):
                    _write_all(descriptor, piece, start + written)
                written += len(piece)
            assert written == num_bytes, (written, num_bytes)
            header = byte_view(aligned_buffer(start))
            header[:] = pack_header(key, num_bytes, checksums)
            with self.explained(key, start + num_bytes):
                _write_all(descriptor, header, 0)
                if self._flushes:
                    os.fsync(descriptor)
                drop_cached_pages(descriptor)
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def explained(self, key: str, file_bytes: int) -> Iterator[None]:
        """Turn what the disk says while a file is written into an error with the way out."""
        try:
            yield
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise self._no_room(key, file_bytes, self.capacity_bytes()) from error
            raise PlacementError(
                f"payload {key} can't be written to {self.folder} ({error.strerror}): give a "
                "spill_dir on a sound, writable disk"
            ) from error

    def _no_room(self, key: str, file_bytes: int, room: int) -> PlacementError:
        return PlacementError(
            f"No space left for payload {key}: it needs {file_bytes} bytes "
            f"({format_bytes(file_bytes)}) in {self.folder}, where {room} ({format_bytes(room)}) "
            "are free: free some, or give a spill_dir on a larger disk"
        )


def _pieces(parts: Iterable[Tensor]) -> Iterator[memoryview]:
    """Cut the parts into pieces of PIECE_BYTES, all in one aligned buffer, one after the other."""
    buffer = aligned_buffer(PIECE_BYTES)
    target = buffer.numpy()
    filled = 0
    for part in parts:
        source, taken = part.numpy(), 0
        while taken < len(part):
            count = min(len(part) - taken, PIECE_BYTES - filled)
            # Not torch's copy: it would wake threads, of which other cores are busy.
            numpy.copyto(target[filled : filled + count], source[taken : taken + count])
            taken, filled = taken + count, filled + count
            if filled == PIECE_BYTES:
                yield byte_view(buffer)
                filled = 0
    if filled:
        yield byte_view(buffer[:filled])


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    written = 0
    while written < len(data):
        written += os.pwrite(descriptor, data[written:], offset + written)


def _flush_folder(folder: Path) -> None:
    """Make a rename last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _max_open_files() -> int:
    """Leave half of the files that this process may open to others."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return _MOST_OPEN_FILES
    return max(min(limit // 2, _MOST_OPEN_FILES), 1)


def _damaged(key: str, path: Path, damage: Damage) -> PlacementError:
    return PlacementError(
        f"payload {key}: {path} {damage}; remove the file and load the model again, which writes "
        "it anew"
    )


def _unreadable(key: str, path: Path, error: OSError) -> PlacementError:
    reason = "it was removed" if isinstance(error, FileNotFoundError) else error.strerror
    return PlacementError(
        f"payload {key} can't be read from {path} ({reason}); load the model again, with a "
        "spill_dir on a sound disk"
    )
