"""Weights by rows: an embedding or a head as a list of shards, of which one at a time is needed.

Matrix products take the shards in turn and write their columns of the output; lookups take the rows
they need. The products of shards have the bits of the whole one's (``payload`` on their sizes).
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...codecs.kernels import EncodedWeight, Scratch
from ..payload.layout import Shard


class ShardReader(Protocol):
    """Gets a shard's bytes, or some of its rows."""

    @property
    def requires_grad(self) -> bool:
        """The parameter's flag, which plain weights get too: torch.matmul chooses how it computes
        by it, with other last bits.
        """

    def pieces(self) -> Iterator[tuple[int, int, AbstractContextManager[Tensor]]]:
        """Yield the rows [start, end) that are there at a time, in order, and the context that
        brings their bytes into fast memory: a whole shard where it is a record.
        """

    def read_rows(self, index: int, ids: Tensor) -> Tensor:
        """Return rows (n, columns) of a shard, by their numbers within it, on the device."""


class StreamedRows:
    """WeightOps on shards that move."""

    looks_up = True

    def __init__(
        self,
        reader: ShardReader,
        shards: Sequence[Shard],
        columns: int,
        dtype: torch.dtype,
        scratch: Scratch | None,
    ) -> None:
        self._reader = reader
        self._shards = shards
        self._columns = columns
        self._dtype = dtype
        self._scratch = scratch

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x @ W.T + bias, shard by shard."""
        output: Tensor | None = None
        num_rows = self._shards[-1].end
        for start, end, context in self._reader.pieces():
            part = None if bias is None else bias[start:end]
            with context as buffer:
                weight = self._weight(start, end, buffer)
                if isinstance(weight, Tensor):
                    product = F.linear(x, weight, part)
                else:
                    product = weight.linear(x, part)
                if output is None:
                    if end - start == num_rows:
                        return product
                    output = product.new_empty(*x.shape[:-1], num_rows)
                output[..., start:end] = product
        assert output is not None
        return output

    def rows(self, ids: Tensor) -> Tensor:
        """Return W[ids], reading each row once."""
        unique, inverse = torch.unique(ids, return_inverse=True)
        found = [
            self._reader.read_rows(index, local)
            for index, local in _split_ids(self._shards, unique)
        ]
        if not found:
            return torch.empty(*ids.shape, self._columns, dtype=self._dtype, device=ids.device)
        return torch.cat(found)[inverse]

    def expand(self, start: int, end: int) -> Tensor:
        """Return rows [start, end)."""
        found: Tensor | None = None
        for first, last, context in self._reader.pieces():
            low, high = max(start, first), min(end, last)
            if low < high:
                with context as buffer:
                    weight = self._weight(first, last, buffer)
                    if found is None:
                        found = torch.empty(
                            end - start, self._columns, dtype=self._dtype, device=buffer.device
                        )
                    within = slice(low - first, high - first)
                    found[low - start : high - start] = (
                        weight[within]
                        if isinstance(weight, Tensor)
                        else weight.expand(within.start, within.stop)
                    )
        assert found is not None
        return found

    def _weight(self, start: int, end: int, buffer: Tensor) -> Tensor | EncodedWeight:
        shard = next(shard for shard in self._shards if shard.start <= start < shard.end)
        if shard.record is None:
            size = (end - start) * self._columns * self._dtype.itemsize
            # A parameter as the whole one is: of a view torch takes the flag of what it views.
            with torch.inference_mode(mode=False):
                rows = buffer[:size].view(self._dtype).view(end - start, self._columns)
                return nn.Parameter(rows, requires_grad=self._reader.requires_grad)
        assert self._scratch is not None
        data = buffer[: shard.data_bytes]
        return EncodedWeight(data, shard.record, dtype=self._dtype, scratch=self._scratch)


def _split_ids(shards: Sequence[Shard], ids: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield (shard's number, row numbers within it) for sorted row numbers; refuses those
    outside.
    """
    if ids.numel() and (int(ids[0]) < 0 or int(ids[-1]) >= shards[-1].end):
        raise IndexError("index out of range in self")  # as torch says it
    ends = torch.tensor([shard.end for shard in shards], device=ids.device)
    cuts = torch.searchsorted(ids, ends).tolist()
    for index, (low, high) in enumerate(zip([0, *cuts], cuts, strict=False)):
        if low < high:
            yield index, ids[low:high] - shards[index].start
