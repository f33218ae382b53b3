"""Writing a file so that it is never read half-written, and reading JSON strictly."""

import contextlib
import json
import mmap
import os
import tempfile
from pathlib import Path
from typing import Any

from .errors import InputError


def cache_folder() -> Path:
    """Return the user's folder for what can be made again."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "tierhints"


def check_writable(path: str | Path | None) -> None:
    """Refuse, before the work starts, an output file that could not be written at its end."""
    if path is None:
        return
    path = Path(path).resolve()
    if path.is_dir():
        raise InputError(f"output {path} is a folder: give a file name")
    if path.exists() and not path.is_file():
        raise InputError(f"output {path} is a device or a pipe: give a regular file")
    folder = path.absolute().parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"output {path} can't be written ({error.strerror}): give a writable folder"
        ) from error


def write_text(text: str, path: str | Path) -> None:
    """Write a text as UTF-8 like ``write_bytes``."""
    write_bytes(text.encode("utf-8"), path)


def write_bytes(data: bytes, path: str | Path) -> None:
    """Write a temporary file beside ``path``, flush it to the disk and rename it; makes the folder
    if need be.

    Raises InputError where the path can't be written at all, OSError where the writing failed (a
    full disk); the old file is then untouched.
    """
    path = Path(path).resolve()  # a link stays one, and its target is replaced
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except (
        PermissionError,
        NotADirectoryError,
        IsADirectoryError,
        FileExistsError,
        FileNotFoundError,
    ) as error:
        raise InputError(
            f"{path} can't be written ({error.strerror}): give a writable file name"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_json(document: Any, path: str | Path) -> None:
    """Write a document as indented JSON like ``write_text``; ValueError for NaN and infinity."""
    write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", path)


def parse_json(text: str) -> Any:
    """Parse JSON; raises InputError where it is cut off or malformed, or has a key twice."""
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"not complete JSON (truncated?): {error}; make it anew") from error


def drop_cached_pages(descriptor: int, offset: int = 0, num_bytes: int = 0) -> None:
    """Keep a file's pages from staying in memory; 0 bytes: all from the offset on."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, num_bytes, os.POSIX_FADV_DONTNEED)


def open_past_cache(path: Path) -> int | None:
    """Open a file for reading whole pages past the page cache, into page-aligned memory; None
    where its file system has no such way.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except (OSError, AttributeError):
        return None
    try:
        os.preadv(descriptor, [page_memory(mmap.PAGESIZE)], 0)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def page_memory(num_bytes: int) -> mmap.mmap:
    """Return zeroed memory that starts on a page and is private to this process.

    It is given back to the system, and not kept by an allocator, when the last view of it goes.
    Large pages, where the system has them: direct reads into them take half the processor time.
    """
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for key, value in pairs:
        if key in document:
            raise InputError(f"key {key!r} appears twice: keep one")
        document[key] = value
    return document
