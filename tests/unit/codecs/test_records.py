import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lib.codecs.layout import GROUP_SIZES, PLANE_BITS, RAW_BITS, RecordLayout
from lib.codecs.quantize import EDGE_MARGIN
from lib.codecs.records import (
    LARGEST_WEIGHT,
    SMALLEST_SCALE,
    Codec,
    check_record,
    decode,
    default_codec,
    encode,
    encode_from,
    parameter_views,
)
from lib.errors import InputError, PlacementError
from lib.vocabulary import Precision

CODECS = [Codec(precision, size) for precision in PLANE_BITS for size in GROUP_SIZES]


def spread(parameters: Tensor, layout: RecordLayout) -> Tensor:
    """Repeat each group's parameter over its weights, in float64."""
    return parameters.double().repeat_interleave(layout.group_size, 1)[:, : layout.cols]


def decode_in_float64(record: Tensor, layout: RecordLayout) -> Tensor:
    """Decode from the formula in docs/codecs.md, one code at a time, without the library's planes.

    A prefix stands for the middle of the codes that begin with it.
    """
    codes = torch.zeros(layout.rows, layout.padded_cols, dtype=torch.float64)
    for plane in layout.planes:
        end = plane.offset + layout.rows * plane.row_bytes
        data = record[plane.offset : end].view(layout.rows, -1, 8 * plane.bits).int()
        pieces = [
            data >> shift & (1 << plane.bits) - 1
            for shift in range(8 - plane.bits, -1, -plane.bits)
        ]
        codes = codes * 2**plane.bits + torch.cat(pieces, 2).flatten(1)
    scales, zeros = (spread(part, layout) for part in parameter_views(record, layout))
    dropped = 2**layout.dropped_bits
    stored = codes[:, : layout.cols] * dropped + (dropped - 1) / 2
    return zeros + scales * (stored - 2 ** (layout.codec.bits - 1))


def largest_of_groups(weight: Tensor, layout: RecordLayout) -> Tensor:
    """Return the largest magnitude of each weight's group."""
    groups = torch.split(weight.double().abs(), layout.group_size, dim=1)
    return spread(torch.cat([group.amax(1, keepdim=True) for group in groups], 1), layout)


def within(scale: Tensor, largest: Tensor) -> Tensor:
    """Return the documented bound of the error, for groups of such scale and magnitude."""
    return scale / 2 * (1 + 2.0**-14) + 2.0**-22 * largest


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    rows, cols = draw(st.integers(1, 9)), draw(st.sampled_from([1, 5, 31, 64, 100, 192]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(rows, cols, generator=generator, dtype=torch.float64)
    kind = draw(st.sampled_from(["normal", "constant", "zero", "shifted", "outlier", "steps"]))
    if kind == "constant":
        weight[:] = draw(st.floats(-2, 2))
    elif kind == "zero":
        weight[:] = 0
    elif kind == "shifted":
        weight += draw(st.floats(-1e4, 1e4))
    elif kind == "outlier":
        weight[0, -1] = draw(st.floats(-1e6, 1e6))
    elif kind == "steps":
        weight = weight.round()
    magnitude = draw(st.sampled_from([1.0, 1e-8, 1e30, 1e-38, 0.02]))
    return (weight * magnitude).float()


@settings(deadline=None, max_examples=300)
@given(weight=weights(), codec=st.sampled_from(CODECS))
def test_the_error_stays_within_half_a_scale(weight: Tensor, codec: Codec) -> None:
    layout = codec.layout(*weight.shape)
    record = encode(weight, codec)
    error = (decode(record, layout).double() - weight.double()).abs()
    scale = spread(parameter_views(record, layout)[0], layout)
    largest = largest_of_groups(weight, layout)
    assert (error <= within(scale, largest)).all()
    # And the scale is no larger than the range asks for, rounding to bfloat16 allowed.
    groups = torch.split(weight.double(), layout.group_size, dim=1)
    spans = [group.amax(1, keepdim=True) - group.amin(1, keepdim=True) for group in groups]
    codes = 2**codec.bits - 1 + 2 * EDGE_MARGIN.get(codec.bits, 0)
    span = spread(torch.cat(spans, 1), layout) + 2.0**-6 * largest
    assert (scale <= (span / codes).clamp_min(SMALLEST_SCALE) * (1 + 2.0**-6)).all()


@settings(deadline=None, max_examples=150)
@given(weight=weights(), codec=st.sampled_from(CODECS), data=st.data())
def test_decoding_follows_the_formula_for_every_prefix(
    weight: Tensor, codec: Codec, data: st.DataObject
) -> None:
    own = PLANE_BITS[codec.precision]
    lower = [name for name, bits in PLANE_BITS.items() if bits == own[: len(bits)]]
    layout = codec.layout(*weight.shape).prefix(data.draw(st.sampled_from(lower)))
    record = encode(weight, codec)[: layout.num_bytes]
    assert check_record(record, layout) == torch.float32
    decoded = decode(record, layout).double()
    expected = decode_in_float64(record, layout)
    largest = largest_of_groups(weight, layout)
    scale = spread(parameter_views(record, layout)[0], layout) * 2**layout.dropped_bits
    assert ((decoded - expected).abs() <= 2.0**-22 * largest + 2.0**-15 * scale).all()
    assert ((decoded - weight).abs() <= within(scale, largest)).all()


def test_a_prefix_has_no_bias() -> None:
    weight = torch.randn(200, 640)
    layout = Codec(Precision.INT8, 64).layout(200, 640)
    record = encode(weight, layout.codec)
    prefix = layout.prefix(Precision.INT4)
    error = decode(record, prefix) - weight
    step = 16 * parameter_views(record, prefix)[0].float().mean()
    assert abs(error.mean()) < 0.01 * step
    independent = decode(encode(weight, Codec(Precision.INT4, 64)), prefix) - weight
    assert error.square().mean() < 1.1 * independent.square().mean()


@pytest.mark.parametrize("precision", list(Precision))
def test_rows_encoded_piece_by_piece_are_the_same_bytes(precision: Precision) -> None:
    weight = torch.randn(300, 100)
    codec = default_codec(precision)
    layout = codec.layout(300, 100)
    record = encode(weight, codec)
    reads: list[int] = []

    def read_rows(start: int, end: int) -> Tensor:
        reads.append(end - start)
        return weight[start:end]

    assert torch.equal(encode_from(read_rows, layout, torch.float32), record)
    assert sum(reads) == 300
    part = torch.zeros(layout.shard(130, 200).num_bytes, dtype=torch.uint8)
    for here, there, length in layout.row_ranges(130, 200):
        part[there : there + length] = record[here : here + length]
    alone = encode(weight[130:200], codec)
    assert torch.equal(part[256:], alone[256:])
    assert torch.equal(decode(part, layout.shard(130, 200)), decode(record, layout, 130, 200))


@pytest.mark.parametrize("precision", list(RAW_BITS))
def test_raw_precisions_are_casts(precision: Precision) -> None:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    weight = torch.randn(5, 33)
    layout = Codec(precision).layout(5, 33)
    record = encode(weight, layout.codec)
    assert torch.equal(decode(record, layout, dtype=dtype), weight.to(dtype))
    out = torch.empty(2, 33, dtype=torch.float32)
    assert decode(record, layout, 1, 3, out=out) is out
    assert torch.equal(out, weight[1:3].to(dtype).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_of_the_weights_is_kept(dtype: torch.dtype) -> None:
    weight = torch.randn(4, 64).to(dtype)
    codec = Codec(Precision.INT8)
    out = torch.full((codec.layout(4, 64).num_bytes,), 77, dtype=torch.uint8)
    assert encode(weight, codec, out=out) is out
    assert torch.equal(out, encode(weight, codec))  # nothing of what was in the buffer is left
    assert check_record(out, codec.layout(4, 64)) == dtype


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 4 * LARGEST_WEIGHT])
@pytest.mark.parametrize("codec", [Codec(Precision.INT4, 64), Codec(Precision.FP16)])
def test_weights_that_are_not_finite_are_refused(value: float, codec: Codec) -> None:
    weight = torch.randn(3, 100)
    weight[1, 70] = value
    with pytest.raises(InputError, match="NaN, infinite"):
        encode(weight, codec)


def test_wrong_weights_are_refused() -> None:
    with pytest.raises(InputError, match="matrix"):
        encode(torch.randn(4), Codec(Precision.INT4))
    with pytest.raises(InputError, match="float64"):
        encode(torch.randn(4, 4, dtype=torch.float64), Codec(Precision.INT4))


@pytest.mark.parametrize("precision", [Precision.INT6, Precision.BF16])
def test_every_changed_byte_that_counts_is_found(precision: Precision) -> None:
    layout = default_codec(precision).layout(6, 64)
    record = encode(torch.randn(6, 64), layout.codec)
    counts = set(range(96))  # the header's fields
    for start, _, length in layout.row_ranges(0, 6):
        counts |= set(range(start, start + length))
    for place in counts:
        damaged = record.clone()
        damaged[place] ^= 1
        with pytest.raises(PlacementError, match="encode the weights again"):
            check_record(damaged, layout)
    with pytest.raises(PlacementError, match="truncated"):
        check_record(record[:-1], layout)


def test_the_record_of_another_weight_is_refused() -> None:
    record = encode(torch.randn(6, 64), Codec(Precision.INT4, 64))
    for other in (
        Codec(Precision.INT4, 64).layout(6, 63),
        Codec(Precision.INT4, 64).layout(5, 64),
        Codec(Precision.INT4, 0).layout(6, 64),
        Codec(Precision.INT2, 64).layout(6, 64),
    ):
        with pytest.raises(PlacementError, match="another weight"):
            check_record(record, other)
