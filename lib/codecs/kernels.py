"""Compressed weights in fast memory: which form a record takes there, and how many bytes that is.

| record | use | held as |
| --- | --- | --- |
| int8 by rows | any | ``Int8Weight``: plain codes, fused kernel for few rows |
| int4 by groups (also as a prefix) | Linear | ``Int4Weight``: packed for the fused kernel |
| int4 by groups | Linear and Embedding | ``PairedWeight``: packed, and the record for its rows |
| anything else | any | ``EncodedWeight``: the record, expanded a shard at a time |

Every
form is tested against ``records.decode``.
"""

from collections.abc import Iterable
from enum import StrEnum
from typing import Protocol

import torch
from torch import Tensor

from ..vocabulary import Precision
from .encoded import EncodedWeight, Scratch, cpu_computes_bf16
from .fused import INT4_ROW_BLOCK, Int4Weight, Int8Weight, inner_tiles, pad_rows
from .layout import PARAMETER_BYTES, WORD_CODES, Codec, RecordLayout

__all__ = [
    "SCRATCH_BYTES",
    "CompressedWeight",
    "EncodedWeight",
    "PairedWeight",
    "Scratch",
    "Use",
    "empty_weight",
    "kernel_name",
    "prepare",
    "resident_bytes",
    "scratch_bytes",
]

SCRATCH_BYTES = 8 * 2**20
"""A good size of scratch: a shard of rows then stays in a CPU's caches from decoding to use."""
_BYTES_PER_CODE, _SCRATCH_GAPS = 10, 1024
"""No form takes more scratch: codes twice, values in fp32 and bf16, the groups' parameters."""
_INT4_GROUPS = {32, 64, 128, 256}


class Use(StrEnum):
    """What a module does with a weight. ``WHOLE``: anything else, for which it is expanded."""

    LINEAR = "linear"
    EMBEDDING = "embedding"
    WHOLE = "whole"


class CompressedWeight(Protocol):
    """A matrix (rows = out features, cols = in features) that computes without being expanded."""

    shape: tuple[int, int]
    dtype: torch.dtype
    """The weight's own, in which ``rows`` and ``expand`` return it."""
    looks_up: bool
    """It has ``rows``."""

    @property
    def num_bytes(self) -> int:
        """Bytes of fast memory held, scratch not counted."""

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``x @ weight.T + bias``: (..., cols) -> (..., rows) in the dtype of ``x``."""

    def rows(self, ids: Tensor) -> Tensor:
        """Return rows by index: any shape -> (*ids.shape, cols)."""

    def expand(self, start_row: int, end_row: int) -> Tensor:
        """Decode some rows, (n, cols): new memory of that size."""

    def fill(self, start_row: int, record: Tensor, layout: RecordLayout) -> None:
        """Take over some rows from the record of these rows, which may be on the CPU; nothing of it
        is kept. ``start_row`` and the number of rows are multiples of 64, up to the last row.
        """


class PairedWeight:
    """A tied weight held twice: packed for Linear, as its record for rows."""

    looks_up = True

    def __init__(self, packed: CompressedWeight, record: CompressedWeight) -> None:
        self.shape, self.dtype = packed.shape, packed.dtype
        self._packed, self._record = packed, record
        self.linear = packed.linear
        self.rows, self.expand = record.rows, record.expand

    @property
    def num_bytes(self) -> int:
        """Bytes of both."""
        return self._packed.num_bytes + self._record.num_bytes

    def fill(self, start_row: int, record: Tensor, layout: RecordLayout) -> None:
        """Take over some rows into both."""
        self._packed.fill(start_row, record, layout)
        self._record.fill(start_row, record, layout)


def kernel_name(device: torch.device | str) -> str:
    """Name what decides which products of compressed weights are rounded to bfloat16."""
    if torch.device(device).type != "cpu":
        return torch.device(device).type
    return "cpu, bf16" if cpu_computes_bf16() else "cpu, fp32"


def scratch_bytes(shapes: Iterable[tuple[int, int]]) -> int:
    """Return a good size of scratch for matrices (rows, cols) at any precision: what a quarter of
    the largest needs, ``SCRATCH_BYTES`` at most unless rows are so long that a block of them, the
    least that is packed at a time, takes more.
    """
    largest = 0
    for rows, cols in shapes:
        row_bytes = _BYTES_PER_CODE * -(-cols // WORD_CODES) * WORD_CODES
        quarter = pad_rows(-(-rows // 4)) * row_bytes
        largest = max(largest, min(quarter, SCRATCH_BYTES), INT4_ROW_BLOCK * row_bytes)
    return largest + _SCRATCH_GAPS if largest else 0


def prepare(
    record: Tensor,
    layout: RecordLayout,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    uses: frozenset[Use],
    scratch: Scratch,
) -> CompressedWeight:
    """Make the resident form of a whole record, in new memory on ``device``.

    ``dtype`` is the weight's own; ``scratch`` is on ``device``. The record isn't checked here
    (``records.check_record``). For one that comes in shards: ``empty_weight`` and ``fill``.
    """
    weight = empty_weight(layout, dtype=dtype, device=device, uses=uses, scratch=scratch)
    weight.fill(0, record, layout)
    return weight


def empty_weight(
    layout: RecordLayout,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    uses: frozenset[Use],
    scratch: Scratch,
) -> CompressedWeight:
    """Allocate the resident form of a record, to be filled by shards of rows."""
    device = torch.device(device)
    form = _form(layout, uses, device)
    if form is Int8Weight:
        return Int8Weight(layout, dtype=dtype, device=device, scratch=scratch)
    record = None
    if form is not Int4Weight:
        buffer = torch.zeros(layout.num_bytes, dtype=torch.uint8, device=device)
        record = EncodedWeight(buffer, layout, dtype=dtype, scratch=scratch)
    if form is EncodedWeight:
        assert record is not None
        return record
    packed = Int4Weight(layout, dtype=dtype, device=device, scratch=scratch)
    return packed if record is None else PairedWeight(packed, record)


def resident_bytes(
    rows: int,
    cols: int,
    codec: Codec,
    uses: frozenset[Use],
    device: torch.device | str,
) -> int:
    """Return the ``num_bytes`` of what ``prepare`` will make, without data."""
    layout = codec.layout(rows, cols)
    form = _form(layout, uses, torch.device(device))
    if form is Int8Weight:
        return rows * cols + 2 * rows * PARAMETER_BYTES
    if form is EncodedWeight:
        return layout.num_bytes
    packed = pad_rows(rows) * (cols // 2 + 2 * layout.num_groups * PARAMETER_BYTES)
    return packed + (layout.num_bytes if form is PairedWeight else 0)


def _form(
    layout: RecordLayout, uses: frozenset[Use], device: torch.device
) -> type[Int8Weight | Int4Weight | EncodedWeight | PairedWeight]:
    by_rows = layout.codec.group_size == 0
    if layout.precision is Precision.INT8 and by_rows:
        return Int8Weight
    fits_int4_kernel = (
        layout.precision is Precision.INT4
        and layout.group_size in _INT4_GROUPS
        and layout.cols % layout.group_size == 0
        and (device.type == "cpu" or inner_tiles(layout.cols) > 0)
    )
    if not fits_int4_kernel or Use.LINEAR not in uses or Use.WHOLE in uses:
        return EncodedWeight  # whose rows decode at once; packed codes must be multiplied for it
    return PairedWeight if Use.EMBEDDING in uses else Int4Weight
