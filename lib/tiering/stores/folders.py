"""Folders for block files: on a disk, writable, and free of what dead processes left behind.

Who is alive is told by file locks (flock), which the kernel drops with their process: process
numbers are used again, and mean nothing on another machine or in another container.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ...errors import InputError
from ...units import SECTOR_BYTES
from .base import aligned_buffer, byte_view

MEMORY_FILESYSTEMS = {"tmpfs", "ramfs"}
"""File systems whose files are memory: no place for the SSD tier."""
_PREFIX = "tierhints-"
_LOCK_NAME = ".tierhints-lock"
_PARTIAL = ".partial"


def default_spill_folder() -> Path:
    """Return TMPDIR if it is set, else /var/tmp, which is on a disk where /tmp often is memory."""
    return Path(os.environ.get("TMPDIR") or "/var/tmp")


def filesystem_type(path: Path) -> str:
    """Return the type of the file system that holds a path, from /proc/mounts; empty where that
    can't be told.
    """
    best, kind = -1, ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/mounts").read_text().splitlines():
            _, mount, mount_kind, *_ = line.split()
            mount_path = Path(mount.encode().decode("unicode_escape"))
            if path.resolve().is_relative_to(mount_path) and len(mount_path.parts) >= best:
                best, kind = len(mount_path.parts), mount_kind
    return kind


def open_folder(folder: Path) -> Path:
    """Make a folder that lasts, and remove what killed writers left in it; raises InputError where
    it can't hold block files.
    """
    made = not folder.exists()
    with _explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    kind = filesystem_type(folder)
    if kind in MEMORY_FILESYSTEMS:
        if made:
            folder.rmdir()
        raise InputError(
            f"spill folder {folder} is on {kind}, which is memory: give a spill_dir on a disk"
        )
    for partial in folder.glob(f".*{_PARTIAL}"):
        if (descriptor := _lock(partial)) is not None:
            partial.unlink(missing_ok=True)
            os.close(descriptor)
    return folder


def make_temporary_folder(parent: Path) -> tuple[Path, int]:
    """Make a folder for one process, and remove those of killed ones; returns it with the lock that
    says that its owner lives (a file descriptor).
    """
    open_folder(parent)
    for lock in parent.glob(f"{_PREFIX}*/{_LOCK_NAME}"):
        if (descriptor := _lock(lock)) is not None:
            shutil.rmtree(lock.parent, ignore_errors=True)
            os.close(descriptor)
    while True:
        with _explained(parent):
            folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
            descriptor = _create_locked(folder / _LOCK_NAME)
        if descriptor is not None:
            return folder, descriptor


def remove_temporary_folder(folder: Path, lock: int, owner: int) -> None:
    """Remove a folder unless this is a forked child of its owner (a process number)."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def create_partial(folder: Path, key: str) -> tuple[Path, int]:
    """Create the file that becomes a block file once it is whole; returns it open for writing, and
    locked for as long as it is.
    """
    while True:
        path = folder / f".{key}.{os.urandom(8).hex()}{_PARTIAL}"
        if (descriptor := _create_locked(path)) is not None:
            return path, descriptor


def accepts_direct_io(folder: Path) -> bool:
    """Try whether the folder's file system reads and writes past the page cache; raises InputError
    where it can't be written at all.
    """
    if not hasattr(os, "O_DIRECT"):
        return False
    page = byte_view(aligned_buffer(SECTOR_BYTES))
    with _explained(folder):
        return _try_direct_io(folder, page)


def _try_direct_io(folder: Path, page: memoryview) -> bool:
    path, descriptor = create_partial(folder, "direct")
    try:
        os.write(descriptor, page)
        direct = os.open(path, os.O_RDWR | os.O_DIRECT)
        try:
            return os.pwrite(direct, page, 0) == os.preadv(direct, [page], 0) == SECTOR_BYTES
        finally:
            os.close(direct)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return False
        raise
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _create_locked(path: Path) -> int | None:
    """Create and lock a file; None where another process took it for a dead process's and
    removed it in between.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    with contextlib.suppress(OSError):  # a file system without locks: nobody can remove it either
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    if os.fstat(descriptor).st_nlink:
        return descriptor
    os.close(descriptor)
    return None


def _lock(path: Path) -> int | None:
    """Open and lock a file that no living process holds; None where one may hold it."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"spill folder {folder} can't be written ({error.strerror}): give another spill_dir"
        ) from error
