"""The logits that an answer's tokens were chosen from, in a file until the answer is measured.

A token's are as many numbers as the vocabulary has: an answer's may be more than its keys and
values, and no budget has room for them. As originals are, they are in a file without a name, which
goes with whoever holds it.
"""

import os
import weakref
from collections.abc import Callable

import torch
import xxhash
from torch import Tensor

from ..errors import PlacementError
from ..files import drop_cached_pages
from ..tiering.stores.base import byte_view
from .kv.originals import OriginalsFolder


class KeptLogits:
    """The logits (V,) of an answer's tokens, in their order; all in one dtype."""

    def __init__(self, folder: OriginalsFolder) -> None:
        self._folder = folder
        self._file: int | None = None
        self._close: Callable[[], object] = lambda: None
        self._dtype = torch.float32
        self._row_bytes = 0
        self._sums: list[int] = []
        self._failure: PlacementError | None = None

    def __len__(self) -> int:
        """Of how many tokens."""
        return len(self._sums)

    def append(self, logits_V: Tensor) -> None:
        """Keep those of the next token. What goes wrong is raised by ``read``: the answer itself
        goes on.
        """
        data = byte_view(logits_V.contiguous().view(torch.uint8))
        self._dtype, self._row_bytes = logits_V.dtype, len(data)
        offset = len(self) * len(data)
        self._sums.append(xxhash.xxh3_64_intdigest(data))
        try:
            if self._file is None:
                self._file, _ = self._folder.open_file(direct=False)
                self._close = weakref.finalize(self, os.close, self._file)
            while data:
                written = os.pwrite(self._file, data, offset)
                data, offset = data[written:], offset + written
            drop_cached_pages(self._file)
        except (OSError, PlacementError) as error:
            self._failure = PlacementError(f"logits of an answer can't be kept ({error})")

    def read(self, start: int, count: int) -> Tensor:
        """Return those of ``count`` tokens, (count, V). Raises PlacementError where they couldn't
        be kept, can't be read, or aren't what was written.
        """
        if self._failure is not None:
            raise self._failure
        assert self._file is not None and start + count <= len(self)
        found = torch.empty(count * self._row_bytes, dtype=torch.uint8)
        for place in range(count):
            row = byte_view(found)[place * self._row_bytes : (place + 1) * self._row_bytes]
            try:
                read = os.preadv(self._file, [row], (start + place) * self._row_bytes)
            except OSError as error:
                raise PlacementError(f"logits of an answer can't be read ({error})") from error
            if read < len(row) or xxhash.xxh3_64_intdigest(row) != self._sums[start + place]:
                raise PlacementError("logits of an answer aren't what was written")
        return found.view(self._dtype).view(count, -1)

    def close(self) -> None:
        """Give the file's room back; otherwise that is done when nobody has this any more."""
        self._close()
