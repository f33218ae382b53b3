"""Where the bytes of a block live outside fast memory: host memory or a file. A store knows bytes,
not modules.

Weights don't change while a runtime is attached, so nothing is ever copied back: a block is written
once, when it leaves.
"""

import contextlib
import os
import shutil
import tempfile
import weakref
import zlib
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..errors import InputError, PlacementError

_ALIGNMENT = 256
"""Start of each tensor inside a block's buffer: no kernel needs more, and every dtype may be viewed
there.
"""
MEMORY_FILESYSTEMS = {"tmpfs", "ramfs"}
"""File systems whose files are memory: no place for the SSD tier."""


class Store(Protocol):
    """Holds the tensors of blocks by block name, in one tier."""

    def put(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Keep a copy of the tensors; their layout (dtype, shape, strides) comes back exactly."""

    def get(self, name: str) -> dict[str, Tensor]:
        """Return the tensors in host memory; read-only for the caller. Raises PlacementError where
        the bytes are not sound.
        """

    def close(self) -> None:
        """Free everything."""


class HostStore:
    """Host DRAM below an accelerator: pinned, so that copies to the device are asynchronous."""

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._tensors: dict[str, dict[str, Tensor]] = {}

    def put(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Copy the tensors to host memory."""
        copies = {}
        for key, tensor in tensors.items():
            copy = torch.empty_strided(
                tensor.size(), tensor.stride(), dtype=tensor.dtype, pin_memory=self._pinned
            )
            copies[key] = copy.copy_(tensor)
        self._tensors[name] = copies

    def get(self, name: str) -> dict[str, Tensor]:
        """Return the host tensors themselves."""
        return self._tensors[name]

    def close(self) -> None:
        """Free the host memory."""
        self._tensors.clear()


class FileStore:
    """A folder with one file per block, checksummed (CRC-32) on every read, removed when closed or
    at exit.

    Pages are dropped from the page cache after each use, so that the tier is the disk and not
    memory in disguise.
    """

    def __init__(self, folder: Path | None) -> None:
        parent = folder or default_spill_folder()
        try:
            parent.mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(prefix="tierhints-", dir=parent))
        except OSError as error:
            raise InputError(
                f"spill folder {parent} can't be written ({error.strerror}): give another spill_dir"
            ) from error
        self._cleanup = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        kind = filesystem_type(parent)
        if kind in MEMORY_FILESYSTEMS:
            self._cleanup()
            raise InputError(
                f"spill folder {parent} is on {kind}, which is memory: give a spill_dir on a disk"
            )
        self._layouts: dict[
            str, dict[str, tuple[int, torch.dtype, torch.Size, tuple[int, ...]]]
        ] = {}
        self._checks: dict[str, tuple[int, int]] = {}
        self._files: dict[str, Path] = {}

    def put(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write one file, synchronously to the disk; a full disk raises OSError and leaves no
        partial file.
        """
        layout, end = {}, 0
        for key, tensor in tensors.items():
            layout[key] = (end, tensor.dtype, tensor.size(), tensor.stride())
            end += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
        buffer = torch.zeros(end, dtype=torch.uint8)
        for key, view in _views(buffer, layout).items():
            view.copy_(tensors[key])
        data = memoryview(buffer.numpy())  # type: ignore[arg-type]
        path = self._folder / f"{len(self._files):05d}.block"
        partial = path.with_suffix(".partial")
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                _drop_cached_pages(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        self._files[name], self._layouts[name], self._checks[name] = (
            path,
            layout,
            (end, zlib.crc32(data)),
        )

    def get(self, name: str) -> dict[str, Tensor]:
        """Read and check one file into a fresh buffer."""
        path = self._files.get(name)
        if path is None:
            raise PlacementError(f"block {name!r} is lost: its store is closed; reload the model")
        num_bytes, checksum = self._checks[name]
        buffer = torch.empty(num_bytes, dtype=torch.uint8)
        data = memoryview(buffer.numpy())  # type: ignore[arg-type]
        try:
            with path.open("rb", buffering=0) as file:
                filled = 0
                while filled < num_bytes and (count := file.readinto(data[filled:])):
                    filled += count
                _drop_cached_pages(file.fileno())
        except OSError as error:
            raise PlacementError(
                f"block {name!r} can't be read from {path}: {error}; detach and attach again"
            ) from error
        if filled < num_bytes:
            raise PlacementError(
                f"block {name!r}: {path} has {filled} of {num_bytes} bytes (truncated); reload the "
                "model"
            )
        if zlib.crc32(data) != checksum:
            raise PlacementError(
                f"block {name!r}: {path} fails its checksum (bytes changed on disk); reload the "
                "model"
            )
        return _views(buffer, self._layouts[name])

    def close(self) -> None:
        """Remove the folder."""
        self._cleanup()
        self._files.clear()


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


def default_spill_folder() -> Path:
    """Return TMPDIR if it is set, else /var/tmp, which is on a disk where /tmp often is memory."""
    return Path(os.environ.get("TMPDIR") or "/var/tmp")


def _views(
    buffer: Tensor, layout: dict[str, tuple[int, torch.dtype, torch.Size, tuple[int, ...]]]
) -> dict[str, Tensor]:
    views = {}
    for key, (start, dtype, size, stride) in layout.items():
        flat = buffer[start : start + size.numel() * dtype.itemsize].view(dtype)
        views[key] = flat.as_strided(size, stride, flat.storage_offset())
    return views


def _drop_cached_pages(descriptor: int) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
