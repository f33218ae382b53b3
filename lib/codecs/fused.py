"""Weights held in the form that torch's own low-bit kernels multiply from: int8 by rows, int4 by
groups. On a CPU they serve where our own kernels (``native``) can't be had.

The kernels take bfloat16 activations (others hit scalar code) and return bfloat16; scales and zeros
of a record are bfloat16 as well, so they compute the very matrix that the reference decodes. Packed
int4 depends on the CPU: it is made on arrival and never written anywhere.
"""

from typing import ClassVar, Self

import torch
from torch import Tensor

from ..errors import PlacementError
from ..vocabulary import Precision
from . import ops
from .expansion import (
    FUSED_INT8_ROWS,
    compute_dtype,
    finish_linear,
    fits_int8_kernel,
    kernel_activations,
)
from .interface import Use
from .layout import PARAMETER_BYTES, PLANE_BITS, RecordLayout
from .planes import unpack_planes
from .records import decode_parameters, section_views
from .scratch import Scratch

INT4_ROW_BLOCK = 64
"""Rows that a kernel packs together, at most: matrices are padded to it."""
_INT4_GROUPS = {32, 64, 128, 256}
_IDENTITY_ROWS = 256
"""Activation rows at once when packed weights are expanded."""


class Int8Weight:
    """int8 codes (rows, cols) with a scale and a zero per row. Serves Linear and Embedding alike.

    Few activation rows go through ``_weight_int8pack_mm`` on a CPU; more, or a GPU, multiply by the
    codes in the compute dtype, which holds them exactly, and scale the product.
    """

    name: ClassVar[str] = "int8 by rows"
    linear_error: ClassVar[float] = 2.0**-7
    decoding_error: ClassVar[float] = 2.0**-20
    looks_up = True

    def __init__(
        self,
        layout: RecordLayout,
        *,
        dtype: torch.dtype,
        device: torch.device,
        scratch: Scratch,
    ) -> None:
        self.shape = (layout.rows, layout.cols)
        self.dtype = dtype
        self._device = device
        self._scratch = scratch
        self._fits_kernel = fits_int8_kernel(layout.cols, device)
        self._codes = torch.zeros(self.shape, dtype=torch.int8, device=device)
        self._scales = torch.zeros(layout.rows, dtype=torch.bfloat16, device=device)
        self._zeros = torch.zeros(layout.rows, dtype=torch.bfloat16, device=device)

    @classmethod
    def supports(cls, layout: RecordLayout, uses: frozenset[Use], device: torch.device) -> bool:
        """Take int8 by rows, for any use, where our own kernels can't be had."""
        by_rows = layout.precision is Precision.INT8 and layout.codec.group_size == 0
        return by_rows and ops.prepare(device.type) == "reference"

    @classmethod
    def planned_bytes(cls, layout: RecordLayout) -> int:
        """Return a byte a code, a scale and a zero a row."""
        return layout.rows * layout.cols + 2 * layout.rows * PARAMETER_BYTES

    @classmethod
    def allocate(
        cls, layout: RecordLayout, *, dtype: torch.dtype, device: torch.device, scratch: Scratch
    ) -> Self:
        """Make one of zeros."""
        return cls(layout, dtype=dtype, device=device, scratch=scratch)

    @property
    def num_bytes(self) -> int:
        """Bytes of codes, scales and zeros."""
        return self._codes.nbytes + self._scales.nbytes + self._zeros.nbytes

    def fill(self, start_row: int, record: Tensor, layout: RecordLayout) -> None:
        """Take over some rows from their record; nothing of ``record`` is kept."""
        sections = [part.to(self._device) for part in section_views(record, layout)]
        *planes, scales, zeros = sections
        rows = slice(start_row, start_row + layout.rows)
        self._scales[rows] = scales[:, 0]
        self._zeros[rows] = zeros[:, 0]
        for start, end in self._scratch.shards(layout.rows, 2 * layout.padded_cols):
            codes, workspace = self._scratch.split(
                *[(torch.uint8, end - start, layout.padded_cols)] * 2
            )
            unpack_planes(
                [plane[start:end] for plane in planes],
                PLANE_BITS[layout.precision],
                codes=codes,
                workspace=workspace.flatten(),
            )
            target = self._codes[start_row + start : start_row + end].view(torch.uint8)
            torch.bitwise_xor(codes[:, : layout.cols], 128, out=target)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``x @ weight.T + bias`` in the dtype of ``x``."""
        flat = x.reshape(-1, self.shape[1])
        if self._fits_kernel and len(flat) <= FUSED_INT8_ROWS:
            flat = kernel_activations(flat)
            y = torch._weight_int8pack_mm(flat, self._codes, self._scales).float()
        else:
            dtype = compute_dtype(flat)
            flat = flat.to(dtype)
            y = flat.new_empty(len(flat), self.shape[0])
            row_bytes = self.shape[1] * dtype.itemsize
            for start, end in self._scratch.shards(self.shape[0], row_bytes):
                (values,) = self._scratch.split((dtype, end - start, self.shape[1]))
                values.copy_(self._codes[start:end])
                torch.mm(flat, values.t(), out=y[:, start:end])
            y = y.float().mul_(self._scales)
        y.addcmul_(flat.sum(1, keepdim=True, dtype=torch.float32), self._zeros)
        return finish_linear(y, x, bias)

    def rows(self, ids: Tensor) -> Tensor:
        """Decode the rows of ``ids`` and no others."""
        flat = ids.reshape(-1)
        values = self._codes.index_select(0, flat).float()
        values.mul_(self._scales[flat, None]).add_(self._zeros[flat, None])
        return values.to(self.dtype).view(*ids.shape, self.shape[1])

    def expand(self, start_row: int, end_row: int) -> Tensor:
        """Decode some rows into new memory."""
        return self.rows(torch.arange(start_row, end_row, device=self._device))


class Int4Weight:
    """int4 codes packed for ``_weight_int4pack_mm_for_cpu`` (CPU) or ``_weight_int4pack_mm``
    (tinygemm, CUDA), for any number of activation rows.

    Both compute (code - 8) * scale + zero by groups of a row. A prefix of a longer code is held
    with its zero rounded to bfloat16. It has no ``rows``: those need the record.
    """

    name: ClassVar[str] = "int4 packed"
    linear_error: ClassVar[float] = 2.0**-7
    decoding_error: ClassVar[float] = 2.0**-9
    looks_up = False

    def __init__(
        self,
        layout: RecordLayout,
        *,
        dtype: torch.dtype,
        device: torch.device,
        scratch: Scratch,
    ) -> None:
        self.shape = (layout.rows, layout.cols)
        self.dtype = dtype
        self.group_size = layout.group_size
        self._device = device
        self._scratch = scratch
        self._padded_rows = pad_rows(layout.rows)
        self._on_cpu = device.type == "cpu"
        if self._on_cpu:
            size: tuple[int, ...] = (self._padded_rows, layout.cols // 2)
            self._packed = torch.zeros(size, dtype=torch.uint8, device=device)
        else:
            self._inner_tiles = inner_tiles(layout.cols)
            size = (self._padded_rows // 8, layout.cols // (16 * self._inner_tiles), 32)
            size = (*size, self._inner_tiles // 2)
            self._packed = torch.zeros(size, dtype=torch.int32, device=device)
        self._parameters = torch.zeros(
            layout.num_groups, self._padded_rows, 2, dtype=torch.bfloat16, device=device
        )

    @classmethod
    def supports(cls, layout: RecordLayout, uses: frozenset[Use], device: torch.device) -> bool:
        """Take int4 by groups, for Linear alone; on a CPU where our own kernels can't be had."""
        fits = uses == {Use.LINEAR} and fits_int4_kernel(layout, device)
        return fits and (device.type != "cpu" or ops.prepare("cpu") == "reference")

    @classmethod
    def planned_bytes(cls, layout: RecordLayout) -> int:
        """Return half a byte a code, a scale and a zero a group, of padded rows."""
        row_bytes = layout.cols // 2 + 2 * layout.num_groups * PARAMETER_BYTES
        return pad_rows(layout.rows) * row_bytes

    @classmethod
    def allocate(
        cls, layout: RecordLayout, *, dtype: torch.dtype, device: torch.device, scratch: Scratch
    ) -> Self:
        """Make one of zeros."""
        return cls(layout, dtype=dtype, device=device, scratch=scratch)

    @property
    def num_bytes(self) -> int:
        """Bytes of packed codes and parameters, padding included."""
        return self._packed.nbytes + self._parameters.nbytes

    def fill(self, start_row: int, record: Tensor, layout: RecordLayout) -> None:
        """Take over some rows from their record; ``start_row`` is a multiple of 64, and so is the
        number of rows unless they are the last.
        """
        last = start_row + layout.rows == self.shape[0]
        if start_row % INT4_ROW_BLOCK or layout.rows % INT4_ROW_BLOCK and not last:
            raise ValueError(
                f"rows {start_row} to {start_row + layout.rows}: both multiples of "
                f"{INT4_ROW_BLOCK}, or up to the last row"
            )
        *planes, scales, zeros = (part.to(self._device) for part in section_views(record, layout))
        parameters = [torch.empty_like(scales, dtype=torch.float32) for _ in range(2)]
        scale, low = decode_parameters(scales, zeros, layout, out=(parameters[0], parameters[1]))
        rows = slice(start_row, start_row + layout.rows)
        self._parameters[:, rows, 0] = scale.t()
        self._parameters[:, rows, 1] = low.add_(scale, alpha=8).t()
        block_bytes = INT4_ROW_BLOCK * layout.cols * (4 + 1 + 1)
        num_blocks = pad_rows(layout.rows) // INT4_ROW_BLOCK
        for block, end_block in self._scratch.shards(num_blocks, block_bytes):
            start, end = block * INT4_ROW_BLOCK, end_block * INT4_ROW_BLOCK
            shard = [plane[start:end] for plane in planes]
            self._pack(shard, layout, slice(start_row + start, start_row + end))

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``x @ weight.T + bias`` in the dtype of ``x``."""
        flat = kernel_activations(x.reshape(-1, self.shape[1]))
        y = self._multiply(flat, self._packed, self._parameters)
        if self._padded_rows != self.shape[0]:
            y = y[:, : self.shape[0]].contiguous()  # as F.linear's result is
        return finish_linear(y, x, bias)

    def rows(self, ids: Tensor) -> Tensor:
        """Packed codes have no addressable rows: raises PlacementError."""
        raise PlacementError("this int4 weight was prepared for Linear only: prepare it for both")

    def expand(self, start_row: int, end_row: int) -> Tensor:
        """Decode some rows into new memory, whatever the packing: multiply the identity by the
        codes alone, and scale in fp32. Slow; for the rare use outside a Linear.
        """
        first = start_row // INT4_ROW_BLOCK * INT4_ROW_BLOCK
        last = pad_rows(end_row)
        cols = self.shape[1]
        packed = self._packed[self._packed_rows(slice(first, last))]
        size = (cols // self.group_size, last - first, 2)
        unit = torch.zeros(size, dtype=torch.bfloat16, device="cpu")
        unit[:, :, 0] = 1
        unit = unit.to(self._device)
        rows = slice(start_row - first, end_row - first)
        out = torch.empty(end_row - start_row, cols, dtype=torch.float32, device=self._device)
        for start in range(0, cols, _IDENTITY_ROWS):
            end = min(start + _IDENTITY_ROWS, cols)
            some = torch.zeros(end - start, cols, dtype=torch.bfloat16, device=self._device)
            some[:, start:end].fill_diagonal_(1)
            out[:, start:end] = self._multiply(some, packed, unit).t()[rows]
        groups = torch.unflatten(out, 1, (-1, self.group_size))
        parameters = self._parameters[:, start_row:end_row].float()
        groups.mul_(parameters[..., 0].t().unsqueeze(-1))
        groups.add_(parameters[..., 1].t().unsqueeze(-1))
        return out.to(self.dtype)

    def _multiply(self, flat: Tensor, packed: Tensor, parameters: Tensor) -> Tensor:
        if self._on_cpu:
            return torch._weight_int4pack_mm_for_cpu(flat, packed, self.group_size, parameters)
        return torch._weight_int4pack_mm(flat, packed, self.group_size, parameters)

    def _pack(self, planes: list[Tensor], layout: RecordLayout, rows: slice) -> None:
        """Pack the codes of a shard, padded to whole blocks of rows, into its place."""
        padded, cols, num_rows = rows.stop - rows.start, layout.cols, len(planes[0])
        words, codes, workspace = self._scratch.split(
            (torch.int32, padded, cols),
            (torch.uint8, padded, layout.padded_cols),
            (torch.uint8, padded, layout.padded_cols),
        )
        codes[num_rows:] = 8
        unpack_planes(
            planes,
            PLANE_BITS[layout.precision],
            codes=codes[:num_rows],
            workspace=workspace.flatten(),
        )
        codes = codes[:, :cols]
        if self._on_cpu:
            packed = torch._convert_weight_to_int4pack_for_cpu(words.copy_(codes), 2)
        else:
            pairs = torch.bitwise_left_shift(codes[:, ::2], 4).bitwise_or_(codes[:, 1::2])
            packed = torch._convert_weight_to_int4pack(pairs, self._inner_tiles)
        self._packed[self._packed_rows(rows)] = packed

    def _packed_rows(self, rows: slice) -> slice:
        """Return where rows (whole blocks) lie in the first dimension of the packed codes."""
        return rows if self._on_cpu else slice(rows.start // 8, rows.stop // 8)


def pad_rows(rows: int) -> int:
    """Round up to whole blocks of rows."""
    return -(-rows // INT4_ROW_BLOCK) * INT4_ROW_BLOCK


def inner_tiles(cols: int) -> int:
    """Return how many tiles of 16 columns tinygemm packs together; 0 where it can't."""
    return next((tiles for tiles in (8, 4, 2) if cols % (16 * tiles) == 0), 0)


def fits_int4_kernel(layout: RecordLayout, device: torch.device) -> bool:
    """Whether torch's int4 kernel of a device multiplies by such a record: whole groups only."""
    return (
        layout.precision is Precision.INT4
        and layout.group_size in _INT4_GROUPS
        and layout.cols % layout.group_size == 0
        and (device.type == "cpu" or inner_tiles(layout.cols) > 0)
    )
