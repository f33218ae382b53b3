"""The full states of a request's pages, in a file below fast memory.

What a compact page was made of is written here while the prompt is computed, and read back, layer
by layer, by whatever needs the full state: later chunks of the prompt, the check of a window, a
climb. A file is nobody's but its request's: it has no name, so that it is gone with its process,
and no other run can take it for its own. Each page has a checksum, held in memory.
"""

import errno
import os
import tempfile
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from ...errors import PlacementError
from ...files import drop_cached_pages
from ...tiering.stores.base import aligned_buffer, byte_view
from ...tiering.stores.folders import accepts_direct_io, default_spill_folder, open_folder
from ...units import SECTOR_BYTES
from ..ladder import PAGE_TOKENS, KvShape

_NO_NAMELESS = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL)
"""What file systems and kernels say that have no files without a name."""


class OriginalsFolder:
    """Where originals are written. Raises InputError where the folder can't hold files, or is
    memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.path = open_folder((folder or default_spill_folder()).absolute())
        self.direct = accepts_direct_io(self.path)

    def open_file(self, *, direct: bool) -> tuple[int, bool]:
        """Return a descriptor of a new file without a name, and whether it is read past the page
        cache, as ``direct`` asks. Raises PlacementError where none can be made.
        """
        direct = direct and self.direct
        try:
            return _open_nameless(self.path, os.O_DIRECT if direct else 0), direct
        except OSError as error:
            raise PlacementError(
                f"a file for originals can't be made in {self.path} ({error.strerror})"
            ) from error


class Originals:
    """The pages of one request, from the first: for each layer its keys (tokens, heads, key_dim)
    and values, so that all pages of a layer are read at once.

    ``base``: those of another text that begins alike, and how many of its pages this one has.

    ``write`` and ``read`` raise PlacementError, naming the page, where the disk is full, a read
    fails or bytes aren't those that were written.
    """

    def __init__(
        self,
        folder: OriginalsFolder,
        shape: KvShape,
        max_pages: int,
        *,
        base: "tuple[Originals, int] | None" = None,
    ) -> None:
        self._shape = shape
        self._page_bytes = tuple(
            PAGE_TOKENS * shape.heads * dim * shape.itemsize
            for dim in (shape.key_dim, shape.value_dim)
        )
        self._base: Originals | None = base[0] if base else None
        self._base_pages = base[1] if base else 0
        self._max_pages = max_pages - self._base_pages
        self._users = 1
        whole_sectors = all(size % SECTOR_BYTES == 0 for size in self._page_bytes)
        self._file, self._direct = folder.open_file(direct=whole_sectors)
        self._sums: dict[tuple[int, int, int], int] = {}
        self._own_bytes = 0
        self.pages = self._base_pages
        """Whole pages of all layers."""

    @property
    def num_bytes(self) -> int:
        """Bytes on disk, those of the base included."""
        shared = sum(self._page_bytes) * self._shape.layers * self._base_pages
        return self._own_bytes + shared

    def write(self, layer: int, page: int, keys: Tensor, values: Tensor) -> None:
        """Write pages of a layer, from ``page`` on: (n * PAGE_TOKENS, heads, dim) each."""
        for part, states in enumerate((keys, values)):
            data = self._aligned(states)
            size = self._page_bytes[part]
            try:
                self._write(byte_view(data), self._offset(layer, part, page - self._base_pages))
            except OSError as error:
                raise PlacementError(
                    f"originals of layer {layer} can't be written ({error.strerror})"
                ) from error
            for index in range(len(data) // size):
                view = data[index * size : (index + 1) * size]
                self._sums[layer, part, page + index] = _checksum(view)
            self._own_bytes += len(data)
        if layer == self._shape.layers - 1:
            self.pages = max(self.pages, page + len(keys) // PAGE_TOKENS)

    def read(self, layer: int, pages: int, keys: Tensor, values: Tensor) -> None:
        """Read the first pages of a layer into ``keys`` and ``values``: contiguous, each of
        (pages * PAGE_TOKENS, heads, dim).
        """
        shared = min(pages, self._base_pages)
        if self._base is not None and shared:
            tokens = shared * PAGE_TOKENS
            self._base.read(layer, shared, keys[:tokens], values[:tokens])
            keys, values = keys[tokens:], values[tokens:]
        if pages == shared:
            return
        for part, states in enumerate((keys, values)):
            size = self._page_bytes[part]
            data = states.view(-1).view(torch.uint8)
            target = data if data.data_ptr() % SECTOR_BYTES == 0 else aligned_buffer(len(data))
            try:
                self._read(byte_view(target), self._offset(layer, part, 0))
            except OSError as error:
                raise PlacementError(
                    f"originals of layer {layer} can't be read ({error.strerror or error})"
                ) from error
            for index, page in enumerate(range(shared, pages)):
                found = _checksum(target[index * size : (index + 1) * size])
                if found != self._sums.get((layer, part, page)):
                    raise PlacementError(
                        f"page {page} of layer {layer} isn't what was written: its checksum differs"
                    )
            if target is not data:
                data.copy_(target)

    def share(self) -> "Originals":
        """Return these, for one more who has to close them."""
        self._users += 1
        return self

    def close(self) -> None:
        """Give the file's room back, once nobody needs it any more."""
        self._users -= 1
        if self._users == 0:
            os.close(self._file)
            self._sums.clear()
            if self._base is not None:
                self._base.close()

    def _offset(self, layer: int, part: int, page: int) -> int:
        before = layer * sum(self._page_bytes) + part * self._page_bytes[0]
        return before * self._max_pages + page * self._page_bytes[part]

    def _aligned(self, states: Tensor) -> Tensor:
        data = states.contiguous().view(-1).view(torch.uint8)
        if data.data_ptr() % SECTOR_BYTES == 0:
            return data
        aligned = aligned_buffer(len(data))
        aligned.copy_(data)
        return aligned

    def _write(self, view: memoryview, offset: int) -> None:
        while view:
            written = os.pwrite(self._file, view, offset)
            view, offset = view[written:], offset + written
        if not self._direct:
            drop_cached_pages(self._file)

    def _read(self, view: memoryview, offset: int) -> None:
        while view:
            read = os.preadv(self._file, [view], offset)
            if not read:
                raise OSError(0, "the file is too short")
            view, offset = view[read:], offset + read
        if not self._direct:
            drop_cached_pages(self._file)


def _open_nameless(folder: Path, flags: int) -> int:
    """Open a new file that never has a name; where the file system has no such files, it has one
    for a moment, which a kill in that moment leaves.
    """
    if hasattr(os, "O_TMPFILE"):
        try:
            return os.open(folder, os.O_TMPFILE | os.O_EXCL | os.O_RDWR | flags, 0o600)
        except OSError as error:
            if error.errno not in _NO_NAMELESS:
                raise
    descriptor, name = tempfile.mkstemp(prefix="tierhints-kv-", dir=folder)
    try:
        if not flags:
            return descriptor
        try:
            return os.open(name, os.O_RDWR | flags)
        finally:
            os.close(descriptor)
    finally:
        os.unlink(name)


def _checksum(data: Tensor) -> int:
    return xxhash.xxh3_64_intdigest(byte_view(data))
