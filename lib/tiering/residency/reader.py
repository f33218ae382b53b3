"""Reading weights for an operation: shards through the prefetcher, rows past it, and whole weights
that are expanded or put together from pieces.
"""

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..payload.layout import SHARD_ROWS, Shard, start_rows
from ..payload.parts import Part
from ..stores import CHUNK_BYTES
from .stand_ins import WeightOps

if TYPE_CHECKING:
    from .access import Access, Held

_STEP_BYTES, _ROW_BLOCK = 2**20, 64
"""Weights, and a multiple of rows, that are expanded at a time: packed codes come in blocks."""


class GroupReader:
    """Gets shards of one group through the prefetcher, and rows past it."""

    def __init__(self, access: "Access", held: "Held") -> None:
        self._access = access
        self._held = held

    @property
    def requires_grad(self) -> bool:
        """The parameter's flag: it decides how torch.matmul computes, also without gradients."""
        return self._access.parameter(self._held.payload.parts[0]).requires_grad

    def pieces(self) -> Iterator[tuple[int, int, AbstractContextManager[Tensor]]]:
        """Yield the rows [start, end) that are there at a time, and what brings their bytes."""
        part, shards = self._held.payload.parts[0], self._held.payload.shards
        for index, shard in enumerate(shards):
            if self._access.prefetcher.has_room([self._held.units[index]]):
                yield shard.start, shard.end, self.hold(index)
                continue
            step = part.rows if shard.record is not None else rows_apart(part, shards)
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
        access, unit = self._access, self._held.units[index]
        access.refuse_written(self._held)
        with access.alone():
            if index == 0:
                access.on_use(unit.group)
            with access.on_move(unit.group) as moved, plain_tensors():
                there = access.prefetcher.acquire(unit)
                moved(unit.data_bytes)
            try:
                yield access._in_memory(self._held, index) if there is None else there
            finally:
                access.prefetcher.release(unit, shared=shared)

    @contextlib.contextmanager
    def _read_apart(self, index: int, start: int, end: int) -> Iterator[Tensor]:
        """Read rows of a shard that the plan has no slot for, since it foresaw lookups only, into
        the buffer of these.
        """
        access, held = self._access, self._held
        unit, part, shard = held.units[index], held.payload.parts[0], held.payload.shards[index]
        assert held.stored is not None
        access.refuse_written(held)
        with access.alone():
            if index == start == 0:
                access.on_use(unit.group)
            with access.on_move(unit.group) as moved, plain_tensors():
                if shard.record is not None:
                    data = access.archive.shard_record(held.stored, shard, access.lookup)
                else:
                    data = access.archive.raw_range(
                        held.stored, part, shard, (start, end), access.lookup
                    )
                access.link.fetch(unit.tier, data.numel())
                moved(data.numel())
                data = data.to(access.device)
            yield data

    def read_rows(self, index: int, ids: Tensor) -> Tensor:
        """Return rows (n, columns) of a shard, by their numbers within it."""
        access, unit = self._access, self._held.units[index]
        access.refuse_written(self._held)
        with access.on_move(unit.group) as moved, plain_tensors():
            rows, moved_bytes = access._read_rows(self._held, index, ids)
            access.link.fetch(unit.tier, moved_bytes)
            moved(moved_bytes)
        return rows


def rows_apart(part: Part, shards: Sequence[Shard]) -> int:
    """Return how many rows of raw shards are read at a time past the slots: products of so many
    have the whole one's bits, also the last ones, and the chunks that they lie in fit into the
    buffer of lookups, which has two. 0: they don't.
    """
    row_bytes = part.columns * part.dtype.itemsize
    step = CHUNK_BYTES // row_bytes // SHARD_ROWS * SHARD_ROWS
    for num_rows in {shard.end - shard.start for shard in shards} if step else ():
        last = start_rows(num_rows, step)[-1]
        if -(-num_rows * row_bytes // CHUNK_BYTES) - last * row_bytes // CHUNK_BYTES > 2:
            return 0
    return step


def expand_whole(ops: WeightOps, part: Part, device: torch.device) -> Tensor:
    """Return a whole weight as a matrix, made a few rows at a time: what that takes is small."""
    step = max(_STEP_BYTES // (part.columns * _ROW_BLOCK), 1) * _ROW_BLOCK
    if part.rows <= step:
        return ops.expand(0, part.rows)
    matrix = torch.empty(part.rows, part.columns, dtype=part.dtype, device=device)
    for start in range(0, part.rows, step):
        end = min(start + step, part.rows)
        matrix[start:end] = ops.expand(start, end)
    return matrix


def in_shape(matrix: Tensor, part: Part) -> Tensor:
    """Return a decoded matrix as the parameter was: its shape and strides."""
    weights = torch.empty_strided(part.shape, part.stride, dtype=part.dtype, device=matrix.device)
    return weights.copy_(matrix.t() if part.transposed else matrix.view(part.shape))


@contextlib.contextmanager
def plain_tensors() -> Iterator[None]:
    """Make ordinary tensors, whatever the caller's modes: those made in inference mode could not be
    used outside it, and a default device (``torch.device("meta")``) is for the caller's tensors.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.no_grad())
        if torch._C._len_torch_function_stack():
            stack.enter_context(torch.device("cpu"))
        yield
