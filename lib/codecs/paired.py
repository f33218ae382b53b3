"""Weights that are multiplied by and looked up in alike: a tied embedding, held in two forms."""

from typing import ClassVar, Self

import torch
from torch import Tensor

from .encoded import EncodedWeight
from .fused import Int4Weight, fits_int4_kernel
from .interface import CompressedWeight, Use, register_kernel
from .layout import RecordLayout
from .scratch import Scratch


@register_kernel
class PairedWeight:
    """A tied weight held twice: packed for Linear, as its record for rows."""

    name: ClassVar[str] = "int4 packed, and its record"
    linear_error: ClassVar[float] = Int4Weight.linear_error
    decoding_error: ClassVar[float] = EncodedWeight.decoding_error
    looks_up = True

    def __init__(self, packed: CompressedWeight, record: CompressedWeight) -> None:
        self.shape, self.dtype = packed.shape, packed.dtype
        self._packed, self._record = packed, record
        self.linear = packed.linear
        self.rows, self.expand = record.rows, record.expand

    @classmethod
    def supports(cls, layout: RecordLayout, uses: frozenset[Use], device: torch.device) -> bool:
        """Take int4 by groups, for Linear and Embedding both."""
        return uses == {Use.LINEAR, Use.EMBEDDING} and fits_int4_kernel(layout, device)

    @classmethod
    def planned_bytes(cls, layout: RecordLayout) -> int:
        """Return the bytes of both."""
        return Int4Weight.planned_bytes(layout) + EncodedWeight.planned_bytes(layout)

    @classmethod
    def allocate(
        cls, layout: RecordLayout, *, dtype: torch.dtype, device: torch.device, scratch: Scratch
    ) -> Self:
        """Make both."""
        packed = Int4Weight.allocate(layout, dtype=dtype, device=device, scratch=scratch)
        record = EncodedWeight.allocate(layout, dtype=dtype, device=device, scratch=scratch)
        return cls(packed, record)

    @property
    def num_bytes(self) -> int:
        """Bytes of both."""
        return self._packed.num_bytes + self._record.num_bytes

    def fill(self, start_row: int, record: Tensor, layout: RecordLayout) -> None:
        """Take over some rows into both."""
        self._packed.fill(start_row, record, layout)
        self._record.fill(start_row, record, layout)
