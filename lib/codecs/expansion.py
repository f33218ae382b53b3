"""Computing with a record in torch alone: expand a few rows to scratch memory, use them, go on.

The reference of the operators (``ops``), and what serves where no kernel of ours does: any codec,
any device. For inference: no gradients.
"""

from functools import cache

import torch
from torch import Tensor

from ..vocabulary import Precision
from .layout import PLANE_BITS, RecordLayout
from .planes import unpack_planes
from .records import add_groups, decode_parameters, scale_codes, section_views
from .scratch import Scratch

FEW_ROWS = 4
"""Activation rows up to which fp32 is as fast as bf16 on a CPU with bf16 units (docs/codecs.md)."""
FUSED_INT8_ROWS = 16
"""Activation rows up to which ``_weight_int8pack_mm`` beats expansion (measured)."""


@cache
def cpu_computes_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 natively; where it doesn't, fp32 is the faster."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def compute_dtype(flat: Tensor) -> torch.dtype:
    """Choose what expanded weights are multiplied in by activations (m, cols): in bf16 only by
    bf16, or what a model loses to rounding would depend on the machine.
    """
    if flat.dtype != torch.bfloat16:
        return torch.float32
    fast = not flat.is_cpu or (len(flat) > FEW_ROWS and cpu_computes_bf16())
    return torch.bfloat16 if fast else torch.float32


def fits_int8_kernel(cols: int, device: torch.device) -> bool:
    """Whether ``_weight_int8pack_mm`` may be called: it reads 16 codes at a time, and past the end
    of a row that isn't a multiple of them.
    """
    return device.type == "cpu" and cols % 32 == 0


def kernel_activations(flat: Tensor) -> Tensor:
    """Return activations (m, cols) as the fused kernels take them: bfloat16, contiguous, and where
    aligned loads find them (a view may start anywhere, and they would fault).
    """
    flat = flat.to(torch.bfloat16).contiguous()
    return flat.clone() if flat.data_ptr() % 64 else flat


def finish_linear(y: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """Add the bias to ``y`` (flat rows) and give it the dtype and leading dimensions of ``x``."""
    if bias is not None:
        y = y + bias
    return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])


class Expansion:
    """A record that computes, where it lies. ``layout`` may be a prefix; ``dtype`` is the weight's
    own; ``scratch`` is on the record's device. The record isn't checked (``records.check_record``).
    """

    def __init__(
        self, record: Tensor, layout: RecordLayout, *, dtype: torch.dtype, scratch: Scratch
    ) -> None:
        self.layout = layout
        self.dtype = dtype
        self._sections = section_views(record, layout)
        self._scratch = scratch
        self._device = record.device
        # Codes, values in fp32 and in bf16, and the parameters in fp32.
        self._row_bytes = layout.padded_cols + 6 * layout.cols + 8 * layout.num_groups
        self._folds = not layout.codec.is_raw and layout.cols % layout.group_size == 0
        self._fits_int8_kernel = (
            layout.precision is Precision.INT8
            and layout.codec.group_size == 0
            and fits_int8_kernel(layout.cols, record.device)
        )

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``x @ weight.T + bias`` in the dtype of ``x``, expanding a shard at a time."""
        flat = x.reshape(-1, self.layout.cols)
        if self._fits_int8_kernel and len(flat) <= FUSED_INT8_ROWS:
            return finish_linear(self._linear_int8(flat), x, bias)
        dtype = self._compute_dtype(flat)
        flat = flat.to(dtype)
        # Into y: autocast leaves such products alone, and would copy the whole weight in others.
        y = flat.new_empty(len(flat), self.layout.rows)
        if self._sections[0].dtype == dtype:
            return finish_linear(torch.mm(flat, self._sections[0].t(), out=y), x, bias)
        # Few rows: what the groups' lows add is a product with the sums of the activations, which
        # is less work than adding them to the weights.
        folds = self._folds and dtype == torch.float32
        groups = (len(flat), self.layout.num_groups, self.layout.group_size)
        sums = flat.reshape(groups).sum(2) if folds else flat
        for start, end in self._scratch.shards(self.layout.rows, self._row_bytes):
            sections = [part[start:end] for part in self._sections]
            shard = y[:, start:end]
            if folds:
                values, low = self._scaled(sections)
                torch.mm(flat, values.t(), out=shard)
                shard.addmm_(sums, low.t())
            else:
                torch.mm(flat, self._values(sections, dtype).t(), out=shard)
        return finish_linear(y, x, bias)

    def rows(self, ids: Tensor) -> Tensor:
        """Decode the rows of ``ids`` and no others."""
        flat = ids.reshape(-1)
        out = torch.empty(len(flat), self.layout.cols, dtype=self.dtype, device=self._device)
        for start, end in self._scratch.shards(len(flat), self._row_bytes):
            sections = [part.index_select(0, flat[start:end]) for part in self._sections]
            out[start:end] = self._values(sections, torch.float32)
        return out.view(*ids.shape, self.layout.cols)

    def expand(self, start_row: int, end_row: int) -> Tensor:
        """Decode some rows into new memory."""
        sections = [part[start_row:end_row] for part in self._sections]
        num_rows = len(sections[0])
        out = torch.empty(num_rows, self.layout.cols, dtype=self.dtype, device=self._device)
        for start, end in self._scratch.shards(num_rows, self._row_bytes):
            out[start:end] = self._values([part[start:end] for part in sections], torch.float32)
        return out

    def _values(self, sections: list[Tensor], dtype: torch.dtype) -> Tensor:
        """Decode the rows of these sections into scratch: (n, cols) of fp32 or bf16."""
        if self.layout.codec.is_raw:
            (values,) = self._scratch.split((torch.float32, len(sections[0]), self.layout.cols))
            values.copy_(sections[0])
        else:
            values, low = self._scaled(sections)
            add_groups(values, low, self.layout)
        if dtype == torch.float32:
            return values
        _, halves = self._scratch.split(
            (torch.float32, len(values), self.layout.cols), (dtype, len(values), self.layout.cols)
        )
        return halves.copy_(values)

    def _scaled(self, sections: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return scaled codes (n, cols) and lows (n, num_groups) of these rows, in scratch."""
        *planes, scales, zeros = sections
        n, groups = scales.shape
        values, codes, scale, low = self._scratch.split(
            (torch.float32, n, self.layout.cols),
            (torch.uint8, n, self.layout.padded_cols),
            (torch.float32, n, groups),
            (torch.float32, n, groups),
        )
        scale, low = decode_parameters(scales, zeros, self.layout, out=(scale, low))
        scale_codes(planes, scale, self.layout, codes=codes, out=values)
        return values, low

    def _linear_int8(self, flat: Tensor) -> Tensor:
        """Multiply by all codes, joined in scratch a shard at a time: (m, rows) in fp32."""
        *planes, scales, zeros = self._sections
        activations = kernel_activations(flat)
        y = torch.empty(len(flat), self.layout.rows, dtype=torch.float32, device=flat.device)
        for start, end in self._scratch.shards(self.layout.rows, self._row_bytes):
            codes, workspace = self._scratch.split(
                (torch.uint8, end - start, self.layout.padded_cols),
                (torch.uint8, end - start, self.layout.padded_cols),
            )
            unpack_planes(
                [plane[start:end] for plane in planes],
                PLANE_BITS[Precision.INT8],
                codes=codes,
                workspace=workspace.flatten(),
            )
            y[:, start:end] = torch._weight_int8pack_mm(
                activations,
                codes.bitwise_xor_(128).view(torch.int8)[:, : self.layout.cols].contiguous(),
                scales[start:end, 0],
            )
        return y.addcmul_(activations.sum(1, keepdim=True, dtype=torch.float32), zeros.t())

    def _compute_dtype(self, flat: Tensor) -> torch.dtype:
        """Choose what to multiply in. bf16 weights and activations need no expansion where the
        device computes with them, nor do those of fp16.
        """
        precision = self.layout.codec.precision
        if precision is Precision.FP16 and flat.dtype == torch.float16 and flat.is_cuda:
            return torch.float16
        if precision in (Precision.FP32, Precision.FP16):
            return torch.float32
        if precision is Precision.BF16 and flat.dtype == torch.bfloat16 and cpu_computes_bf16():
            return torch.bfloat16
        return compute_dtype(flat)
