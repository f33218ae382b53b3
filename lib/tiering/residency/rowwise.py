"""Weights by rows: an embedding or a head as a list of shards, of which one at a time is needed.

Matrix products take the shards in turn and write their columns of the output; lookups take the rows
they need. The products of shards have the bits of the whole one's (``payload`` on their sizes).
"""

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...codecs.kernels import EncodedWeight, Use
from ...codecs.layout import RecordLayout
from ..payload.layout import SHARD_ROWS, Shard, start_rows
from ..stores import CHUNK_BYTES
from .fast_memory import FastMemory
from .stand_ins import plain_tensors

if TYPE_CHECKING:
    from .held import HeldGroup


class StreamedRows:
    """WeightOps on the shards of a group, which come through slots, or rows past them."""

    looks_up = True

    def __init__(self, group: "HeldGroup") -> None:
        self._group = group
        self._part = group.payload.parts[0]
        self._shards = group.payload.shards

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x @ W.T + bias, shard by shard."""
        output: Tensor | None = None
        num_rows = self._shards[-1].end
        for start, end, context in self._pieces():
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
        found = [self._read_rows(index, local) for index, local in _split_ids(self._shards, unique)]
        if not found:
            return torch.empty(
                *ids.shape, self._part.columns, dtype=self._part.dtype, device=ids.device
            )
        return torch.cat(found)[inverse]

    def expand(self, start: int, end: int) -> Tensor:
        """Return rows [start, end)."""
        found: Tensor | None = None
        for first, last, context in self._pieces():
            low, high = max(start, first), min(end, last)
            if low < high:
                with context as buffer:
                    weight = self._weight(first, last, buffer)
                    if found is None:
                        found = torch.empty(
                            end - start,
                            self._part.columns,
                            dtype=self._part.dtype,
                            device=buffer.device,
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
            size = (end - start) * self._part.columns * self._part.dtype.itemsize
            # A parameter as the whole one is: of a view torch takes the flag of what it views, and
            # torch.matmul chooses by it how it computes, also without gradients.
            flag = self._group.weights.parameter(self._part).requires_grad
            with torch.inference_mode(mode=False):
                rows = buffer[:size].view(self._part.dtype).view(end - start, self._part.columns)
                return nn.Parameter(rows, requires_grad=flag)
        return self._record(shard.record, buffer[: shard.data_bytes])

    def _record(self, layout: RecordLayout, data: Tensor) -> EncodedWeight:
        assert self._memory.scratch is not None
        return EncodedWeight(data, layout, dtype=self._part.dtype, scratch=self._memory.scratch)

    @property
    def _memory(self) -> FastMemory:
        return self._group.memory

    def _pieces(self) -> Iterator[tuple[int, int, AbstractContextManager[Tensor]]]:
        """Yield the rows [start, end) that are there at a time, in order, and the context that
        brings their bytes into fast memory: a whole shard where it is a record.
        """
        for index, shard in enumerate(self._shards):
            if self._memory.prefetcher.has_room([self._group.units[index]]):
                yield shard.start, shard.end, self.hold(index)
                continue
            step = self._part.rows if shard.record is not None else _rows_apart(self._group)
            num_rows = shard.end - shard.start
            starts = start_rows(num_rows, step)
            for start, end in zip(starts, [*starts[1:], num_rows], strict=True):
                context = self._read_apart(index, start, end)
                yield shard.start + start, shard.start + end, context

    @contextlib.contextmanager
    def hold(self, index: int, *, shared: bool = False) -> Iterator[Tensor]:
        """Bring a shard into fast memory for as long as the context lasts. ``shared``: others than
        us see it, and may keep a view.
        """
        memory, unit = self._memory, self._group.units[index]
        self._group.refuse_written()
        with memory.watcher.alone():
            if index == 0:
                memory.watcher.used(unit.group)
            with memory.watcher.moving(unit.group) as moved, plain_tensors():
                there = memory.prefetcher.acquire(unit)
                moved(unit.data_bytes)
            try:
                yield self._group.shard_in_memory(index) if there is None else there
            finally:
                memory.prefetcher.release(unit, shared=shared)

    @contextlib.contextmanager
    def _read_apart(self, index: int, start: int, end: int) -> Iterator[Tensor]:
        """Read rows of a shard that the plan has no slot for, since it foresaw lookups only, into
        the buffer of these.
        """
        memory, group, shard = self._memory, self._group, self._shards[index]
        unit = group.units[index]
        assert group.stored is not None
        group.refuse_written()
        with memory.watcher.alone():
            if index == start == 0:
                memory.watcher.used(unit.group)
            with memory.watcher.moving(unit.group) as moved, plain_tensors():
                if shard.record is not None:
                    data = group.archive.shard_record(group.stored, shard, memory.lookup)
                else:
                    data = group.archive.raw_range(
                        group.stored, self._part, shard, (start, end), memory.lookup
                    )
                memory.charges.fetch(unit.tier, data.numel())
                moved(data.numel())
                data = data.to(memory.device)
            yield data

    def _read_rows(self, index: int, ids: Tensor) -> Tensor:
        """Return rows (n, columns) of a shard, by their numbers within it, on the device."""
        memory, group, shard = self._memory, self._group, self._shards[index]
        unit = group.units[index]
        assert group.stored is not None
        group.refuse_written()
        with memory.watcher.moving(unit.group) as moved, plain_tensors():
            if shard.record is None:
                rows, num_bytes = group.archive.raw_rows(
                    group.stored, self._part, shard, ids, memory.lookup
                )
                rows = rows.to(memory.device)
            else:
                data = group.archive.shard_record(group.stored, shard, memory.lookup)
                rows = self._record(shard.record, data.to(memory.device)).rows(ids)
                num_bytes = shard.data_bytes
            memory.charges.fetch(unit.tier, num_bytes)
            moved(num_bytes)
        return rows


def reads_apart(group: "HeldGroup") -> bool:
    """Say whether all of a group can be had without a slot, in the buffer of lookups."""
    part = group.payload.parts[0]
    if not group.by_rows or Use.EMBEDDING not in part.uses or not len(group.memory.lookup):
        return False
    return part.record is not None or _rows_apart(group) > 0


def _rows_apart(group: "HeldGroup") -> int:
    """Return how many rows of raw shards are read at a time past the slots: products of so many
    have the whole one's bits, also the last ones, and the chunks that they lie in fit into the
    buffer of lookups, which has two. 0: they don't.
    """
    part = group.payload.parts[0]
    row_bytes = part.columns * part.dtype.itemsize
    step = CHUNK_BYTES // row_bytes // SHARD_ROWS * SHARD_ROWS
    sizes = {shard.end - shard.start for shard in group.payload.shards}
    for num_rows in sizes if step else ():
        last = start_rows(num_rows, step)[-1]
        if -(-num_rows * row_bytes // CHUNK_BYTES) - last * row_bytes // CHUNK_BYTES > 2:
            return 0
    return step


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
