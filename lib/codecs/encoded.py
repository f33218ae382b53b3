"""The form in which compressed weights compute from the bytes of their record, wherever it lies."""

from typing import ClassVar, Self

import torch
from torch import Tensor

from ..vocabulary import Precision
from . import ops
from .expansion import Expansion
from .interface import Use
from .layout import RecordLayout
from .records import raw_view
from .scratch import Scratch

_FEW_ROWS = 32
"""Rows of activations up to which bf16 weights are multiplied as they are."""


class EncodedWeight:
    """Computes straight from a record, which it doesn't copy: a view into a slot will do. Takes any
    record for any use; streamed weights are computed from in this form alone.

    ``layout`` may be a prefix; ``dtype`` is the weight's own; ``scratch`` is on the record's
    device. The record isn't checked here (``records.check_record``).
    """

    name: ClassVar[str] = "encoded"
    linear_error: ClassVar[float] = 2.0**-7
    decoding_error: ClassVar[float] = 2.0**-20
    looks_up = True

    def __init__(
        self, record: Tensor, layout: RecordLayout, *, dtype: torch.dtype, scratch: Scratch
    ) -> None:
        self.layout = layout
        self.dtype = dtype
        self.shape = (layout.rows, layout.cols)
        self.record = record
        self._scratch = scratch
        self._layout = ops.layout_arguments(layout)
        self._expansion: Expansion | None = None
        self._halves: Tensor | None = None
        if layout.codec.is_raw:
            self._expansion = Expansion(record, layout, dtype=dtype, scratch=scratch)
            halves = layout.precision is Precision.BF16 and record.is_cpu
            if halves and ops.prepare("cpu") == "native":
                self._halves = raw_view(record, layout)
        else:
            ops.prepare(record.device.type)

    @classmethod
    def supports(cls, layout: RecordLayout, uses: frozenset[Use], device: torch.device) -> bool:
        """Anything: what the others don't take is held as it is."""
        return True

    @classmethod
    def planned_bytes(cls, layout: RecordLayout) -> int:
        """Return the bytes of the record as far as it is read."""
        return layout.num_bytes

    @classmethod
    def allocate(
        cls, layout: RecordLayout, *, dtype: torch.dtype, device: torch.device, scratch: Scratch
    ) -> Self:
        """Make one on a record of its own."""
        record = torch.zeros(layout.num_bytes, dtype=torch.uint8, device=device)
        return cls(record, layout, dtype=dtype, scratch=scratch)

    @property
    def num_bytes(self) -> int:
        """Bytes of the record as far as it is read."""
        return self.layout.num_bytes

    def fill(self, start_row: int, record: Tensor, layout: RecordLayout) -> None:
        """Copy the sections of some rows' record to their places."""
        for here, there, length in self.layout.row_ranges(start_row, start_row + layout.rows):
            self.record[here : here + length].copy_(record[there : there + length])

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``x @ weight.T + bias`` in the dtype of ``x``."""
        if self._halves is not None and x.numel() <= _FEW_ROWS * self.shape[1]:
            halves: Tensor = torch.ops.tierhints.linear_bf16(x, self._halves, bias)
            return halves
        if self._expansion is not None:
            return self._expansion.linear(x, bias)
        y: Tensor = torch.ops.tierhints.linear(
            x, self.record, bias, *self._layout, self._scratch.num_bytes
        )
        return y

    def rows(self, ids: Tensor) -> Tensor:
        """Decode the rows of ``ids`` and no others."""
        if self._expansion is not None:
            return self._expansion.rows(ids)
        found: Tensor = torch.ops.tierhints.rows(ids, self.record, *self._layout, self.dtype)
        return found

    def expand(self, start_row: int, end_row: int) -> Tensor:
        """Decode some rows into new memory."""
        if self._expansion is not None:
            return self._expansion.expand(start_row, end_row)
        weights: Tensor = torch.ops.tierhints.decode(
            self.record, *self._layout, start_row, end_row, self.dtype
        )
        return weights
