"""Records of a checkpoint's weights, kept for the next load: block files in ``.tierhints`` beside
the checkpoint, or in the user's cache where none can be written there; $TIERHINTS_RECORDS names
another folder.

They are a copy of what the checkpoint says: what is missing, damaged or can't be kept is made from
it. The key of a payload has the identity of its weights, so those of a checkpoint that has changed
aren't found. The files take no more room than the checkpoint; the least recently used go first.
"""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import xxhash
from torch import Tensor

from ...errors import InputError, PlacementError
from ...files import cache_folder
from ...units import GIB, format_bytes
from .behind import Add, WriteBehind
from .block_file import BlockFile, header_bytes
from .file import SUFFIX, FileStore

RECORDS_VARIABLE = "TIERHINTS_RECORDS"
"""Names a folder for the records of all checkpoints; empty: none are kept."""
_NAME = ".tierhints"
_SPARE_BYTES = GIB
"""Left free on the disk."""


class KeptRecords:
    """The records of one checkpoint. Used by one thread at a time; several processes may keep the
    same.
    """

    def __init__(self, checkpoint: Path, checkpoint_bytes: int) -> None:
        self._checkpoint = checkpoint.absolute()
        self._limit = checkpoint_bytes
        self._keeps = os.environ.get(RECORDS_VARIABLE) != ""
        self._store: FileStore | None = None
        self._writer: WriteBehind | None = None
        self._used: set[Path] = set()
        self._total_bytes = 0
        """Of the files in the folder and on their way there, as far as this process knows."""

    def has(self, key: str) -> bool:
        """Say whether a payload is kept, by this process or one before."""
        if self._keeps:
            self._open()
        if self._store is None or self.find(key) is None:
            return False
        path = self._store.path(key)
        if path not in self._used:
            self._used.add(path)
            with contextlib.suppress(OSError):  # another user's
                os.utime(path)
        return True

    def find(self, key: str) -> BlockFile | None:
        """Return the file of a payload that was asked for with ``has`` or ``keep`` before; None
        where it isn't kept. For any thread.
        """
        if self._store is not None:
            with contextlib.suppress(PlacementError):
                return self._store.find(key)
        return None

    def keep(self, key: str, num_bytes: int, make: Callable[[], Iterable[Tensor]]) -> bool:
        """See to it that a payload is kept, from the parts that ``make`` returns where it isn't;
        returns whether it is. Where it can't be nothing is kept from then on, which is said once.
        """
        if self.has(key):
            return True
        if not self._make_room(key, num_bytes):
            return False
        assert self._store is not None
        try:
            self._store.put(key, num_bytes, make())
        except (PlacementError, OSError) as error:
            self._stop(error)
            return False
        return True

    @contextlib.contextmanager
    def adding(self, key: str, num_bytes: int) -> Iterator[Add]:
        """Keep a payload while it is used: yields what takes its parts. ``finish`` waits, and says
        where it could not be kept.
        """
        if self._writer is not None and self._writer.failed:
            self.finish()
        if not self._make_room(key, num_bytes):
            yield lambda offset, data, stays: None
            return
        assert self._writer is not None
        with self._writer.put(key, num_bytes) as add:
            yield add

    def later(self) -> contextlib.AbstractContextManager[None]:
        """Leave the disk to others for a while."""
        if self._keeps:
            self._open()
        return contextlib.nullcontext() if self._writer is None else self._writer.later()

    def finish(self) -> None:
        """Wait until what was added is kept."""
        error = None if self._writer is None else self._writer.finish()
        if isinstance(error, PlacementError | OSError):
            self._stop(error)
        elif error is not None:
            raise error

    def read_into(self, key: str, start: int, out: Tensor) -> None:
        """Read like a store; PlacementError where the bytes are not sound, which aren't kept
        then.
        """
        assert self._store is not None
        try:
            self._store.read_into(key, start, out)
        except PlacementError:
            self._store.remove(key)
            raise

    def close(self) -> None:
        """Close the files, once what was added is kept."""
        try:
            self.finish()
        finally:
            if self._writer is not None:
                self._writer.close()
            if self._store is not None:
                self._store.close()

    def _open(self) -> None:
        """Open the first folder that can be written, or keep nothing."""
        if self._store is not None:
            return
        reasons: list[InputError] = []
        for folder in record_folders(self._checkpoint):
            try:
                self._store = FileStore(folder, durable=False)
            except InputError as error:
                reasons.append(error)
                continue
            with contextlib.suppress(OSError):
                (folder / ".gitignore").write_text("*\n")
            self._writer = WriteBehind(self._store)
            self._total_bytes = sum(_file_sizes(folder).values())
            return
        self._stop(reasons[-1])

    def _make_room(self, key: str, num_bytes: int) -> bool:
        """Remove what was used longest ago where there would be too much; returns whether a payload
        may be kept.
        """
        if self._keeps:
            self._open()
        if not self._keeps:
            return False
        assert self._store is not None
        file_bytes, free_bytes = header_bytes(num_bytes) + num_bytes, self._store.capacity_bytes()
        if free_bytes < file_bytes + _SPARE_BYTES:
            self._stop(
                f"{format_bytes(free_bytes)} of the disk are free, of which "
                f"{format_bytes(_SPARE_BYTES)} are left to others"
            )
            return False
        self._used.add(self._store.path(key))
        self._total_bytes += file_bytes
        if self._total_bytes > self._limit:
            for path, size in _file_sizes(self._store.folder).items():
                if self._total_bytes > self._limit and path not in self._used:
                    with contextlib.suppress(OSError):  # another user's
                        path.unlink(missing_ok=True)
                        self._total_bytes -= size
        return True

    def _stop(self, reason: object) -> None:
        self._keeps = False
        warnings.warn(
            f"records of {self._checkpoint} are not kept for the next load, which will make them "
            f"anew: {reason} (${RECORDS_VARIABLE} names another folder, or none)",
            stacklevel=2,
        )


def record_folders(checkpoint: Path) -> list[Path]:
    """Return where records of a checkpoint may be kept, the best place first."""
    named = xxhash.xxh3_128_hexdigest(str(checkpoint.resolve()).encode())
    if given := os.environ.get(RECORDS_VARIABLE):
        return [Path(given).absolute() / named]
    beside = checkpoint if checkpoint.is_dir() else checkpoint.parent
    return [beside / _NAME, cache_folder() / "records" / named]


def _file_sizes(folder: Path) -> dict[Path, int]:
    """Return the bytes of the block files in a folder, those used longest ago first."""
    files: list[tuple[int, Path, int]] = []
    for path in folder.glob(f"*{SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):  # another process made room
            stat = path.stat()
            files.append((stat.st_mtime_ns, path, stat.st_size))
    return {path: size for _, path, size in sorted(files)}
