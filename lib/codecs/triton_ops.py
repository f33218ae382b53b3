"""The operators of ``ops`` on CUDA: how ``triton_kernels`` are launched.

Imported only where a CUDA device is in use (whose builds of torch bring Triton) or its interpreter.

- ``multiply_few``: up to ``FEW_ROWS`` activation rows; products and sums in fp32.
- ``multiply_tiles``: more. Tensor cores take weights and activations in bf16 where the activations
  are bf16, else in tf32, which holds fp16 exactly (compute capability 8.0 or later); sums are fp32.
- ``decode_rows``: lookups and expansion, in fp32 until the result is cast.

Sizes of blocks were chosen by reading what the compiler makes of them: no GPU has measured them.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_kernels as kernels
from .layout import PLANE_BITS, Codec
from .triton_kernels import Form

FEW_ROWS = 4
"""Activation rows up to which fp32 arithmetic keeps up with memory."""
TILE_ERROR = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10, torch.float32: 2.0**-9}
"""Weights are rounded to bf16, or cut to tf32, and so are fp32 activations."""
_FEW_WEIGHTS = 8192
"""Weights that a program of four warps unpacks at once for one row: 64 a thread."""
_TILE_ROWS, _MOST_TILE_COLUMNS, _TILE_WEIGHTS = 64, 64, 256
"""Weight rows and, at most, activation rows of a tile, and weights of a row unpacked at once. More
spill registers on Ampere; so many take less than its 99 KiB of shared memory, in fp32 too.
"""
_PRECISIONS = {sum(bits): precision for precision, bits in PLANE_BITS.items()}


@dataclass(frozen=True, slots=True)
class Record:
    """A layout as kernels take it: ``places`` are the integers that they all share, ``row_bytes``
    those of a row in the narrowest plane.
    """

    form: Form
    rows: int
    cols: int
    row_bytes: int
    places: tuple[int, ...]

    def runs(self, num_bytes: int) -> int:
        """Return the blocks that have so many bytes in the narrowest plane, 1 at least."""
        return max(1, num_bytes // self.form.run)


@cache
def _describe(rows: int, cols: int, group_size: int, stored_bits: int, bits: int) -> Record:
    codec = Codec(_PRECISIONS[stored_bits], group_size)
    layout = codec.layout(rows, cols).prefix(_PRECISIONS[bits])
    first, *rest = layout.planes
    row_bytes = layout.planes[-1].row_bytes
    dropped = 1 << layout.dropped_bits
    form = Form(
        first=first.bits,
        rest=rest[0].bits if rest else 0,
        num_rest=len(rest),
        group=group_size,
        dropped=dropped,
        low=(dropped - 1) / 2 - (1 << (stored_bits - 1)),
    )
    offsets = [plane.offset for plane in layout.planes]
    offsets += [0] * (3 - len(offsets))
    places = (rows, cols, layout.num_groups, row_bytes // form.run, layout.zeros_offset, *offsets)
    return Record(form=form, rows=rows, cols=cols, row_bytes=row_bytes, places=places)


def linear(
    x: Tensor,
    record: Tensor,
    bias: Tensor | None,
    rows: int,
    cols: int,
    group_size: int,
    stored_bits: int,
    bits: int,
    scratch_bytes: int,
) -> Tensor:
    """Return ``x @ weight.T + bias`` in the dtype of ``x``: ``ops.linear``, without its scratch.

    Its error is that of rounding the result, and of the sum of the magnitudes of what is added up
    2**-20 (up to ``FEW_ROWS`` activation rows) or ``TILE_ERROR`` (more).
    """
    described = _describe(rows, cols, group_size, stored_bits, bits)
    form, row_bytes = described.form, described.row_bytes
    flat = x.reshape(-1, cols).contiguous()
    y = flat.new_empty(len(flat), rows)
    if not len(flat):
        return y.view(*x.shape[:-1], rows)
    with torch.cuda.device(record.get_device()):
        if len(flat) <= FEW_ROWS:
            block, block_rows = _few_block(form, row_bytes, len(flat))
            grid = (triton.cdiv(rows, block_rows), 1)
            lane = 16 // x.element_size()
            sizes = (form, len(flat), block_rows, described.runs(block))
            kernels.multiply_few[grid](flat, record, bias, y, *described.places, *sizes, lane)
        else:
            # Triton's interpreter can't multiply in bf16.
            halves = x.dtype == torch.bfloat16 and not triton.knobs.runtime.interpret
            columns, block = _tile_block(form, row_bytes, len(flat))
            grid = (triton.cdiv(len(flat), columns), triton.cdiv(rows, _TILE_ROWS))
            sizes = (form, columns, _TILE_ROWS, described.runs(block))
            kernels.multiply_tiles[grid](
                flat,
                record,
                bias,
                y,
                len(flat),
                *described.places,
                *sizes,
                tl.bfloat16 if halves else tl.float32,
                num_stages=2,
            )
    return y.view(*x.shape[:-1], rows)


def look_up(
    ids: Tensor,
    record: Tensor,
    rows: int,
    cols: int,
    group_size: int,
    stored_bits: int,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    """Decode the rows of ``ids``, (*ids.shape, cols) of ``dtype``: ``ops.rows``.

    An id outside the matrix gives NaN, and reads nothing.
    """
    described = _describe(rows, cols, group_size, stored_bits, bits)
    flat = ids.reshape(-1).contiguous()
    out = _decode_into(record, described, flat, 0, len(flat), dtype)
    return out.view(*ids.shape, cols)


def decode(
    record: Tensor,
    rows: int,
    cols: int,
    group_size: int,
    stored_bits: int,
    bits: int,
    start: int,
    end: int,
    dtype: torch.dtype,
) -> Tensor:
    """Decode rows [start, end), (n, cols) of ``dtype``: ``ops.decode``."""
    described = _describe(rows, cols, group_size, stored_bits, bits)
    return _decode_into(record, described, None, start, end - start, dtype)


def _decode_into(
    record: Tensor,
    described: Record,
    ids: Tensor | None,
    start: int,
    num_rows: int,
    dtype: torch.dtype,
) -> Tensor:
    """Decode rows from ``start`` on, or those of ``ids``, into new memory."""
    out = torch.empty(num_rows, described.cols, dtype=dtype, device=record.device)
    if not num_rows:
        return out
    block, block_rows = _few_block(described.form, described.row_bytes, 1)
    grid = (triton.cdiv(num_rows, block_rows), triton.cdiv(described.row_bytes, block))
    sizes = (described.form, block_rows, described.runs(block))
    with torch.cuda.device(record.get_device()):
        kernels.decode_rows[grid](ids, start, num_rows, record, out, *described.places, *sizes)
    return out


def _few_block(form: Form, row_bytes: int, x_rows: int) -> tuple[int, int]:
    """Choose the bytes of the narrowest plane, and the rows, that four warps unpack at once: few
    enough that codes and sums stay in registers, cut so that little of a row is wasted.
    """
    size = _FEW_WEIGHTS // form.pieces // triton.next_power_of_2(x_rows)
    block = next((n for n in (512, 256, 128) if -(-row_bytes // n) * n <= 1.25 * row_bytes), 64)
    return block, max(1, size // block)


def _tile_block(form: Form, row_bytes: int, x_rows: int) -> tuple[int, int]:
    """Choose the activation rows, and the bytes of the narrowest plane, of a tile."""
    columns = min(_MOST_TILE_COLUMNS, max(16, triton.next_power_of_2(x_rows)))
    block = min(64, _TILE_WEIGHTS // form.pieces, triton.next_power_of_2(row_bytes))
    return columns, max(16, block)
