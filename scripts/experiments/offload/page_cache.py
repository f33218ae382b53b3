"""Files out of the page cache, so that a run begins cold, and what stayed in it."""

import ctypes
import mmap
import os
from pathlib import Path


def drop_page_cache(folder: Path) -> tuple[int, int]:
    """Drop the files below a folder from the page cache: returns bytes looked at, and left in it.

    Pages that a process has mapped stay.
    """
    total = left = 0
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.is_symlink():
            continue
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            os.fsync(file.fileno())  # dirty pages would stay
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            total += size
            left += _cached_bytes(file.fileno(), size)
    return total, left


def _cached_bytes(file: int, size: int) -> int:
    """Return how many bytes of an open file the page cache holds (mincore of a mapping of it)."""
    if not size:
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    with mmap.mmap(file, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as m:
        address = ctypes.addressof(ctypes.c_char.from_buffer(m))
        pages = (ctypes.c_ubyte * (-(-size // mmap.PAGESIZE)))()
        if libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), pages):
            raise OSError(ctypes.get_errno(), "mincore failed")
    return min(size, sum(page & 1 for page in pages) * mmap.PAGESIZE)
