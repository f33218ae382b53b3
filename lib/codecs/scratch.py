"""Working memory of kernels: allocated once, cut into what a computation needs."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import InputError
from .layout import ALIGNMENT


class Scratch:
    """Working memory of a fixed size, allocated beforehand, shared by the weights of one device.

    One computation uses it at a time: nothing in it outlives a call, and calls from several
    threads (or CUDA streams) each need their own.
    """

    def __init__(self, num_bytes: int, device: torch.device | str = "cpu") -> None:
        self.num_bytes = num_bytes
        self._buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def resize(self, num_bytes: int) -> None:
        """Have another size from the next computation on."""
        if num_bytes != self.num_bytes:
            device, self.num_bytes = self._buffer.device, num_bytes
            self._buffer = torch.empty(0, dtype=torch.uint8, device=device)
            self._buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def split(self, *parts: tuple[torch.dtype, int, int]) -> list[Tensor]:
        """Return uninitialised matrices (dtype, rows, cols), one after another in the buffer."""
        start, views = 0, []
        for dtype, rows, cols in parts:
            end = start + rows * cols * dtype.itemsize
            views.append(self._buffer[start:end].view(dtype).view(rows, cols))
            start = -(-end // ALIGNMENT) * ALIGNMENT
        return views

    def shards(self, num_rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
        """Cut rows so that each part fits; InputError where one row doesn't."""
        gaps = 8 * ALIGNMENT  # a split loses one per part, at most
        count = (self.num_bytes - gaps) // row_bytes
        if count < 1:
            raise InputError(
                f"scratch of {self.num_bytes} bytes can't hold one row of a matrix: give at least "
                f"{row_bytes + gaps}"
            )
        for start in range(0, num_rows, count):
            yield start, min(start + count, num_rows)
