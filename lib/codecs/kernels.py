"""Compressed weights in fast memory: which form a record takes there, and how many bytes that is.

| record | use | held as |
| --- | --- | --- |
| any | any | ``EncodedWeight``: the record, from which our own kernels compute (``ops``) |

Where those can't be had, in torch alone:

| int8 by rows | any | ``Int8Weight``: plain codes, fused kernel for few rows |
| int4 by groups (also as a prefix) | Linear | ``Int4Weight``: packed for the fused kernel |
| anything else | any | ``EncodedWeight``: the record, expanded a shard at a time |

Every form is tested against ``records.decode``. A kernel that a user registers (``interface``) is
asked before these.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from . import ops
from .encoded import EncodedWeight
from .expansion import cpu_computes_bf16
from .fused import INT4_ROW_BLOCK, Int4Weight, Int8Weight, pad_rows
from .interface import KERNELS, CompressedWeight, Use, register_kernel
from .layout import BLOCK_CODES, Codec, RecordLayout
from .scratch import Scratch

__all__ = [
    "KERNELS",
    "SCRATCH_BYTES",
    "CompressedWeight",
    "EncodedWeight",
    "Scratch",
    "Use",
    "choose_kernel",
    "empty_weight",
    "kernel_name",
    "prepare",
    "register_kernel",
    "resident_bytes",
    "scratch_bytes",
    "takes_over",
]

SCRATCH_BYTES = 8 * 2**20
"""A good size of scratch: a shard of rows then stays in a CPU's caches from decoding to use."""
_BYTES_PER_CODE, _SCRATCH_GAPS = 10, 1024
"""No form takes more scratch: codes twice, values in fp32 and bf16, the groups' parameters."""
_OWN: tuple[type[CompressedWeight], ...] = (EncodedWeight, Int8Weight, Int4Weight)
for _kernel in _OWN:
    register_kernel(_kernel)


def kernel_name(device: torch.device | str, dtype: torch.dtype) -> str:
    """Name what decides how products of compressed weights are rounded: the device, what
    activations of ``dtype`` are multiplied in, and kernels that were registered beside our own.
    """
    kind = torch.device(device).type
    if kind == "cpu":
        halves = dtype == torch.bfloat16 and cpu_computes_bf16()
        kind = f"cpu {ops.prepare(kind)}, {'bf16' if halves else 'fp32'}"
    return ", ".join([kind, *(kernel.name for kernel in KERNELS.values() if kernel not in _OWN)])


def scratch_bytes(shapes: Iterable[tuple[int, int]]) -> int:
    """Return a good size of scratch for matrices (rows, cols) at any precision: what a sixteenth of
    the largest needs, ``SCRATCH_BYTES`` at most unless rows are so long that a block of them, the
    least that is packed at a time, takes more.
    """
    largest = 0
    for rows, cols in shapes:
        row_bytes = _BYTES_PER_CODE * -(-cols // BLOCK_CODES) * BLOCK_CODES
        share = pad_rows(-(-rows // 16)) * row_bytes
        largest = max(largest, min(share, SCRATCH_BYTES), INT4_ROW_BLOCK * row_bytes)
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
    """Make the resident form of a whole record, on ``device``: in new memory, or the record itself,
    which mustn't change any more, where that is the form and no part of larger memory.

    ``dtype`` is the weight's own; ``scratch`` is on ``device``. The record isn't checked here
    (``records.check_record``). For one that comes in shards: ``empty_weight`` and ``fill``.
    """
    is_own = record.numel() == record.untyped_storage().nbytes() == layout.num_bytes
    if is_own and record.is_cpu and takes_over(layout, uses, torch.device(device)):
        return EncodedWeight(record, layout, dtype=dtype, scratch=scratch)
    weight = empty_weight(layout, dtype=dtype, device=device, uses=uses, scratch=scratch)
    weight.fill(0, record, layout)
    return weight


def takes_over(layout: RecordLayout, uses: frozenset[Use], device: torch.device) -> bool:
    """Say whether ``prepare`` computes with the record that it is given, where that is in host
    memory.
    """
    return device.type == "cpu" and choose_kernel(layout, uses, device) is EncodedWeight


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
    kernel = choose_kernel(layout, uses, device)
    return kernel.allocate(layout, dtype=dtype, device=device, scratch=scratch)


def resident_bytes(
    rows: int,
    cols: int,
    codec: Codec,
    uses: frozenset[Use],
    device: torch.device | str,
) -> int:
    """Return the ``num_bytes`` of what ``prepare`` will make, without data."""
    layout = codec.layout(rows, cols)
    return choose_kernel(layout, uses, torch.device(device)).planned_bytes(layout)


def choose_kernel(
    layout: RecordLayout, uses: frozenset[Use], device: torch.device
) -> type[CompressedWeight]:
    """Return the kernel that holds such a weight: of those that support it the one that was
    registered last. Of our own only ``EncodedWeight``, the first, supports what another does.
    """
    return next(
        kernel for kernel in reversed(KERNELS.values()) if kernel.supports(layout, uses, device)
    )
