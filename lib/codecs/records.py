"""The reference codecs: weights to records and back, in torch alone; where there is the extension
(``native``) it encodes, to the same bytes.

Each group of a row's weights keeps a scale ``s`` and a zero ``z`` and b-bit codes ``q``:

    w ~ z + s * (q - 2**(b-1))

The zero is the value of the middle code, half a scale above the middle of the group's range, so it
is small where weights are centred on 0. Both are bfloat16: fused kernels take them so, hence add no
error of their own, and its range is that of float32, so no group is too small or too large to be
represented. Minimum and maximum are covered, and for every weight

    |w - decoded| <= s / 2 * (1 + 2**-14) + 2**-22 * max|w of the group|

(the second term and the 2**-14 are float32's own rounding; ``s`` >= ``SMALLEST_SCALE``). The first
planes of a record decode with scale s * 2**d and zero z + s * (2**d - 1) / 2, d the bits left out:
the middle of the codes they stand for, so that no weight is biased.
"""

import struct
from collections.abc import Callable, Sequence

import torch
import xxhash
from torch import Tensor

from ..errors import InputError, PlacementError
from ..units import rows_within
from ..vocabulary import Precision
from .layout import PLANE_BITS, Codec, Plane, RecordLayout, default_codec
from .native import load_native
from .planes import unpack_planes
from .quantize import (
    LARGEST_WEIGHT,
    SMALLEST_SCALE,
    Workspace,
    group_views,
    quantize_rows,
    unsound_row,
)

__all__ = [
    "LARGEST_WEIGHT",
    "SMALLEST_SCALE",
    "Codec",
    "Plane",
    "RecordLayout",
    "check_record",
    "decode",
    "default_codec",
    "encode",
    "encode_from",
]

SHARD_WEIGHTS = 1 << 19
"""Weights encoded at once: their working memory stays in a processor's caches."""
RAW_DTYPES = {
    Precision.FP32: torch.float32,
    Precision.BF16: torch.bfloat16,
    Precision.FP16: torch.float16,
}
_MAGIC = b"TIERHINT"
_VERSION = 2
_HEADER = struct.Struct("<8sHHI8s8sQQ5Q")
"""Magic, version, 0, group size, precision, dtype, rows, cols, checksums of the
sections; then the checksum of all that.
"""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def encode(weight: Tensor, codec: Codec, *, out: Tensor | None = None) -> Tensor:
    """Encode a matrix (rows, cols) of fp32, bf16 or fp16 weights on any device.

    Returns a uint8 CPU tensor of ``codec.layout(rows, cols).num_bytes``, or fills ``out``. Raises
    InputError for another shape or dtype, and for weights that aren't finite or too large.
    """
    if weight.dim() != 2:
        raise InputError(
            f"a weight of shape {tuple(weight.shape)}: a matrix (rows, cols) is needed"
        )
    layout = codec.layout(*weight.shape)
    return encode_from(lambda start, end: weight[start:end], layout, weight.dtype, out=out)


def encode_from(
    read_rows: Callable[[int, int], Tensor],
    layout: RecordLayout,
    dtype: torch.dtype,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Encode a matrix that is read a few rows at a time: ``read_rows(start, end)`` -> (n, cols).

    Only the record and one shard of rows (some MiB) are held. A row's bytes don't depend on the
    others, so any split gives the same record. ``dtype`` is the weights' own, noted in the header.
    Raises like ``encode``.
    """
    if dtype not in _DTYPE_NAMES:
        raise InputError(f"weights of {dtype}: allowed are {', '.join(_DTYPES)}")
    record = torch.zeros(layout.num_bytes, dtype=torch.uint8) if out is None else out
    assert record.dtype == torch.uint8 and record.numel() == layout.num_bytes
    assert layout.precision == layout.codec.precision, "a prefix can't be encoded, only read"
    if out is not None:
        record.zero_()  # the gaps between the sections
    shard_rows = min(rows_within(SHARD_WEIGHTS, layout.cols), layout.rows)
    native = not layout.codec.is_raw and load_native().library is not None
    work = None if native or layout.codec.is_raw else Workspace(layout, shard_rows)
    all_sections = section_views(record, layout)
    for start in range(0, layout.rows, shard_rows):
        end = min(start + shard_rows, layout.rows)
        rows = read_rows(start, end).detach().to("cpu")
        assert rows.shape == (end - start, layout.cols), "read_rows gave another shape"
        sections = [view[start:end] for view in all_sections]
        if native:
            _encode_rows(rows, record, layout, first=start)
        elif work is None:
            _cast_rows(rows, sections[0], layout.codec.precision, first=start)
        else:
            quantize_rows(rows, sections, layout, work, first=start)
    record[: _HEADER.size + 8] = _header(record, layout, dtype)
    return record


def decode(
    record: Tensor,
    layout: RecordLayout,
    start_row: int = 0,
    end_row: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """Decode rows [start_row, end_row) of a record on its own device: (n, cols) of ``dtype``.

    Nothing is checked here: see ``check_record``. A prefix of a record decodes with
    ``layout.prefix(precision)``.
    """
    end_row = layout.rows if end_row is None else end_row
    if layout.codec.is_raw:
        values = raw_view(record, layout)[start_row:end_row]
    else:
        sections = [view[start_row:end_row] for view in section_views(record, layout)]
        *planes, scales, zeros = sections
        blank = torch.empty_like(scales, dtype=torch.float32)
        scale, low = decode_parameters(scales, zeros, layout, out=(blank, blank.clone()))
        codes = record.new_empty(len(scales), layout.padded_cols)
        values = torch.empty(len(scales), layout.cols, device=record.device)
        scale_codes(planes, scale, layout, codes=codes, out=values)
        add_groups(values, low, layout)
    return values.to(dtype, copy=True) if out is None else out.copy_(values)


def check_record(record: Tensor, layout: RecordLayout) -> torch.dtype:
    """Verify a record (or the prefix that ``layout`` reads) in host memory; return the dtype of the
    weights that it was made from.

    Raises PlacementError where the header isn't that of such a record or a checksum fails.
    """
    if record.numel() < layout.num_bytes:
        raise PlacementError(
            f"record of {record.numel()} bytes, {layout.num_bytes} expected (truncated): encode "
            "the weights again"
        )
    data = record[: _HEADER.size + 8].numpy().tobytes()
    magic, version, _, group_size, precision, dtype, rows, cols, *checks = _HEADER.unpack_from(data)
    (header_check,) = struct.unpack_from("<Q", data, _HEADER.size)
    if magic != _MAGIC or header_check != xxhash.xxh3_64_intdigest(data[: _HEADER.size]):
        raise PlacementError("record with a damaged header: encode the weights again")
    found = (version, precision.rstrip(b"\0").decode(), group_size, rows, cols)
    codec = layout.codec
    wanted = (_VERSION, str(codec.precision), codec.group_size, layout.rows, layout.cols)
    if found != wanted:
        raise PlacementError(
            f"record of another weight: version, precision, group size, rows and cols are {found}, "
            f"expected {wanted}: encode the weights again"
        )
    sums = _checksums(record, layout)
    if sums != checks[: len(sums)]:
        raise PlacementError(
            f"{codec.precision} record of {layout.rows} x {layout.cols} weights fails its "
            "checksum (bytes changed): encode the weights again"
        )
    return _DTYPES[dtype.rstrip(b"\0").decode()]


def scale_codes(
    planes: Sequence[Tensor], scales: Tensor, layout: RecordLayout, *, codes: Tensor, out: Tensor
) -> None:
    """Write codes times scales of some rows into ``out``, fp32 (n, cols).

    ``planes``: (n, row_bytes) each; ``scales``: fp32 (n, num_groups); ``codes``: uint8 (n, padded
    cols), overwritten.
    """
    workspace = out.view(torch.uint8).flatten()  # not needed for values yet
    if 4 * layout.cols < layout.padded_cols:
        workspace = torch.empty_like(codes).flatten()
    unpack_planes(planes, PLANE_BITS[layout.precision], codes=codes, workspace=workspace)
    out.copy_(codes[:, : layout.cols])
    for values, scale in group_views(out, scales, layout.group_size):
        values.mul_(scale)


def add_groups(values: Tensor, lows: Tensor, layout: RecordLayout) -> None:
    """Add the value of code 0, fp32 (n, num_groups), to scaled codes (n, cols), in place."""
    for group, low in group_views(values, lows, layout.group_size):
        group.add_(low)


def decode_parameters(
    scales: Tensor, zeros: Tensor, layout: RecordLayout, *, out: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return scale and value of code 0 of each group, fp32 (n, num_groups), as a prefix needs them.

    Made in ``out`` from stored scales and zeros, bfloat16 (n, num_groups).
    """
    scale, low = out
    scale.copy_(scales)
    dropped = 1 << layout.dropped_bits
    low.copy_(zeros).add_(scale, alpha=(dropped - 1) / 2 - (1 << (layout.codec.bits - 1)))
    return scale.mul_(dropped), low


def plane_view(record: Tensor, layout: RecordLayout, plane: Plane) -> Tensor:
    """Return a plane's bytes (rows, row_bytes), a view of the record."""
    end = plane.offset + layout.rows * plane.row_bytes
    return record[plane.offset : end].view(layout.rows, plane.row_bytes)


def parameter_views(record: Tensor, layout: RecordLayout) -> tuple[Tensor, Tensor]:
    """Return scales and zeros, bfloat16 (rows, num_groups), views of the record."""
    views = [
        record[start : start + layout.parameters_bytes].view(torch.bfloat16)
        for start in (layout.scales_offset, layout.zeros_offset)
    ]
    scales, zeros = (view.view(layout.rows, layout.num_groups) for view in views)
    return scales, zeros


def raw_view(record: Tensor, layout: RecordLayout) -> Tensor:
    """Return the weights of a raw record (rows, cols) in its dtype, a view."""
    (plane,) = layout.planes
    return plane_view(record, layout, plane).view(RAW_DTYPES[layout.codec.precision])


def section_views(record: Tensor, layout: RecordLayout) -> list[Tensor]:
    """Return views of all sections, one row each per row of the matrix: the raw weights, or the
    planes, then scales and zeros.
    """
    if layout.codec.is_raw:
        return [raw_view(record, layout)]
    planes = [plane_view(record, layout, plane) for plane in layout.planes]
    return [*planes, *parameter_views(record, layout)]


def _encode_rows(rows: Tensor, record: Tensor, layout: RecordLayout, *, first: int) -> None:
    """Do what ``quantize_rows`` does, in the extension."""
    codec = layout.codec
    shape = layout.rows, layout.cols, codec.group_size, codec.bits
    bad = torch.ops.tierhints.encode_rows(rows, record, first, *shape)
    if bad >= 0:
        raise unsound_row(bad)


def _cast_rows(rows: Tensor, target: Tensor, precision: Precision, *, first: int) -> None:
    low, high = torch.aminmax(target.copy_(rows))  # NaN where there is one
    if not (low.isfinite() and high.isfinite()):
        raise InputError(
            f"weights of rows {first} to {first + len(rows)} are NaN, infinite or too large for "
            f"{precision}: mend them, or store a wider precision"
        )


def _checksums(record: Tensor, layout: RecordLayout) -> list[int]:
    """Return the checksum of each section without the padding behind it: scales, zeros, planes."""
    views = section_views(record, layout)
    views = views if layout.codec.is_raw else views[-2:] + views[:-2]
    flat = (view.view(torch.uint8).flatten().numpy() for view in views)
    return [xxhash.xxh3_64_intdigest(memoryview(data)) for data in flat]  # type: ignore[arg-type]


def _header(record: Tensor, layout: RecordLayout, dtype: torch.dtype) -> Tensor:
    codec = layout.codec
    checks = _checksums(record, layout)
    data = _HEADER.pack(
        _MAGIC,
        _VERSION,
        0,
        codec.group_size,
        str(codec.precision).encode(),
        _DTYPE_NAMES[dtype].encode(),
        layout.rows,
        layout.cols,
        *checks,
        *[0] * (5 - len(checks)),
    )
    data += struct.pack("<Q", xxhash.xxh3_64_intdigest(data))
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
