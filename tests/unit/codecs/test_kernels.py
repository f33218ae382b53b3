import pytest
import torch
from torch import Tensor

from lib.codecs import encoded
from lib.codecs.fused import Int4Weight, Int8Weight
from lib.codecs.kernels import (
    SCRATCH_BYTES,
    CompressedWeight,
    EncodedWeight,
    PairedWeight,
    Scratch,
    Use,
    empty_weight,
    prepare,
    resident_bytes,
    scratch_bytes,
)
from lib.codecs.layout import PLANE_BITS, RAW_BITS
from lib.codecs.records import Codec, decode, encode
from lib.errors import InputError, PlacementError
from lib.vocabulary import Precision

LINEAR, EMBEDDING = frozenset({Use.LINEAR}), frozenset({Use.EMBEDDING})
BOTH = LINEAR | EMBEDDING
CODECS = [Codec(precision, size) for precision in PLANE_BITS for size in (0, 64)] + [
    Codec(precision) for precision in RAW_BITS
]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]
ROUNDING = 2.0**-7
"""Activations, weights and results may each be rounded to bfloat16 (8 bits, so 2**-9 of a value):
three such errors of the sum of magnitudes, and some room.
"""


def make(
    codec: Codec,
    rows: int = 200,
    cols: int = 128,
    *,
    device: str = "cpu",
    uses: frozenset[Use] = LINEAR,
    streamed: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[CompressedWeight, Tensor]:
    """Return a prepared weight, or its record as it streams, and what the reference decodes."""
    torch.manual_seed(rows + cols)
    record = encode(torch.randn(rows, cols) * 0.02 + 0.005, codec)
    layout, scratch = codec.layout(rows, cols), Scratch(1 << 17, device)
    decoded = decode(record, layout).to(device)
    if streamed:
        return EncodedWeight(record.to(device), layout, dtype=dtype, scratch=scratch), decoded
    return prepare(record, layout, dtype=dtype, device=device, uses=uses, scratch=scratch), decoded


def storage_bytes(weight: object) -> int:
    """Add up the tensors that a weight holds, wherever it keeps them, scratch apart."""
    tensors: dict[int, int] = {}
    for value in vars(weight).values():
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            tensors[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, EncodedWeight | Int4Weight):
            tensors[id(value)] = storage_bytes(value)
    return sum(tensors.values())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_linear_computes_what_the_reference_decodes(
    codec: Codec, streamed: bool, device: str
) -> None:
    weight, decoded = make(codec, device=device, streamed=streamed)
    bias = torch.randn(200, device=device)
    for num_rows in (0, 1, 3, 16, 40):
        x = torch.randn(2, num_rows, 128, device=device)
        y = weight.linear(x, bias)
        expected = x.double() @ decoded.double().t() + bias
        room = x.double().abs() @ decoded.double().abs().t() + bias.abs()
        assert y.shape == (2, num_rows, 200) and y.dtype == torch.float32
        assert ((y - expected).abs() <= ROUNDING * room).all()


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (70, 100), (3, 1), (65, 192)], ids=str)
def test_any_shape_and_use_decodes_like_the_reference(codec: Codec, shape: tuple[int, int]) -> None:
    for uses in (LINEAR, EMBEDDING, BOTH):
        weight, decoded = make(codec, *shape, uses=uses)
        scale = decoded.abs().max()
        assert weight.shape == shape
        for start, end in ((0, shape[0]), (shape[0] // 2, shape[0])):
            part = weight.expand(start, end)
            assert (part - decoded[start:end]).abs().max() <= 2.0**-20 * scale
        if Use.EMBEDDING in uses:
            ids = torch.tensor([[0, shape[0] - 1, 0], [shape[0] // 2, 0, 0]])
            assert (weight.rows(ids) - decoded[ids]).abs().max() <= 2.0**-20 * scale
        if Use.LINEAR in uses:
            x = torch.randn(2, shape[1])
            room = x.abs() @ decoded.abs().t()
            assert ((weight.linear(x) - x @ decoded.t()).abs() <= ROUNDING * room + 1e-30).all()


@pytest.mark.parametrize("uses", [LINEAR, EMBEDDING, BOTH], ids=lambda uses: "+".join(sorted(uses)))
def test_resident_bytes_are_what_is_held(uses: frozenset[Use]) -> None:
    for codec in CODECS:
        for rows, cols in ((200, 128), (33, 100)):
            weight, _ = make(codec, rows, cols, uses=uses)
            planned = resident_bytes(rows, cols, codec, uses, "cpu")
            assert weight.num_bytes == planned == storage_bytes(weight), codec


def test_which_form_is_held() -> None:
    int4, int8 = Codec(Precision.INT4, 64), Codec(Precision.INT8)
    assert isinstance(make(int4)[0], Int4Weight)
    assert isinstance(make(int4, uses=EMBEDDING)[0], EncodedWeight)
    assert isinstance(make(int4, uses=BOTH)[0], PairedWeight)
    assert isinstance(make(int4, cols=100)[0], EncodedWeight)  # the kernel wants whole groups
    assert isinstance(make(int8, uses=BOTH)[0], Int8Weight)
    assert isinstance(make(Codec(Precision.INT6, 64))[0], EncodedWeight)


@pytest.mark.parametrize("uses", [LINEAR, BOTH], ids=["linear", "both"])
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_a_weight_filled_by_shards_is_the_same(codec: Codec, uses: frozenset[Use]) -> None:
    values = torch.randn(200, 128)
    layout, scratch = codec.layout(200, 128), Scratch(1 << 17)
    whole, parts = (
        empty_weight(layout, dtype=torch.float32, device="cpu", uses=uses, scratch=scratch)
        for _ in range(2)
    )
    whole.fill(0, encode(values, codec), layout)
    for start, end in ((128, 200), (0, 64), (64, 128)):
        shard = encode(values[start:end], codec)
        parts.fill(start, shard, layout.shard(start, end))
        shard.fill_(255)  # nothing of it may be kept
    x = torch.randn(3, 128)
    assert torch.equal(whole.linear(x), parts.linear(x))
    assert torch.equal(whole.expand(0, 200), parts.expand(0, 200))


def test_the_int4_kernel_computes_from_the_prefix_of_an_int8_record() -> None:
    codec = Codec(Precision.INT8, 64)
    values = torch.randn(100, 128)
    prefix = codec.layout(100, 128).prefix(Precision.INT4)
    record = encode(values, codec)[: prefix.num_bytes]
    weight = prepare(
        record, prefix, dtype=torch.float32, device="cpu", uses=LINEAR, scratch=Scratch(1 << 17)
    )
    assert isinstance(weight, Int4Weight)
    assert weight.num_bytes == resident_bytes(100, 128, Codec(Precision.INT4, 64), LINEAR, "cpu")
    # Only the zero is rounded, to bfloat16.
    decoded = decode(record, prefix)
    assert (weight.expand(0, 100) - decoded).abs().max() <= 2.0**-9 * decoded.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", list(Precision))
def test_half_precision_models_get_their_dtype_back(
    precision: Precision, dtype: torch.dtype
) -> None:
    codec = Codec(precision, 64 if precision is Precision.INT4 else 0)
    weight, decoded = make(codec, uses=BOTH, dtype=dtype)
    for num_rows in (1, 40):
        x = torch.randn(num_rows, 128, dtype=dtype)
        y = weight.linear(x, torch.zeros(200, dtype=dtype))
        room = x.float().abs() @ decoded.abs().t()
        assert y.dtype == dtype
        assert ((y.float() - x.float() @ decoded.t()).abs() <= ROUNDING * room).all()
    assert weight.rows(torch.tensor([3])).dtype == weight.expand(0, 2).dtype == dtype


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.INT4])
def test_activations_may_lie_anywhere_in_memory(precision: Precision) -> None:
    # torch's kernels load aligned vectors, or fault; a view need not start at one.
    weight, _ = make(Codec(precision, 0 if precision is Precision.INT8 else 64))
    buffer = torch.randn(4 * 128 + 7).bfloat16()
    for start in (1, 7):
        x = buffer[start : start + 4 * 128].view(4, 128)
        assert torch.equal(weight.linear(x), weight.linear(x.clone()))
    strided = buffer[:256].view(128, 2).t()
    assert torch.equal(weight.linear(strided), weight.linear(strided.contiguous()))


def test_scratch_bounds_the_working_memory() -> None:
    codec = Codec(Precision.INT3, 64)
    values = torch.randn(500, 64)
    layout, record, x = codec.layout(500, 64), encode(values, codec), torch.randn(9, 64)
    kwargs = {"dtype": torch.float32, "uses": LINEAR, "device": "cpu"}
    small, large = (
        prepare(record, layout, scratch=Scratch(size), **kwargs) for size in (4096, 1 << 20)
    )
    torch.testing.assert_close(small.linear(x), large.linear(x), rtol=0, atol=0.2)
    torch.testing.assert_close(small.linear(x[:1]), large.linear(x[:1]))
    assert torch.equal(small.expand(0, 500), large.expand(0, 500))
    tiny = prepare(record, layout, scratch=Scratch(2048 + 100), **kwargs)
    with pytest.raises(InputError, match="scratch of 2148 bytes .* at least"):
        tiny.linear(x)


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1), (70, 100), (3, 1), (65, 192), (500, 64), (8, 28672)], ids=str
)
def test_scratch_of_a_good_size_expands_a_small_matrix_in_sixteen_parts(
    codec: Codec, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards: list[int] = []
    cut = Scratch.shards

    def count(self: Scratch, num_rows: int, row_bytes: int) -> list[tuple[int, int]]:
        parts = list(cut(self, num_rows, row_bytes))
        shards.append(len(parts))
        return parts

    monkeypatch.setattr(Scratch, "shards", count)
    layout, record = codec.layout(*shape), encode(torch.randn(shape), codec)
    scratch = Scratch(scratch_bytes([(1, 1), shape]))
    weights: list[CompressedWeight] = [
        prepare(record, layout, dtype=torch.float32, device="cpu", uses=uses, scratch=scratch)
        for uses in (LINEAR, EMBEDDING, BOTH)
    ]
    weights.append(EncodedWeight(record, layout, dtype=torch.float32, scratch=scratch))
    for weight in weights:
        weight.expand(0, shape[0])
        for rows in (1, 3, 40):
            weight.linear(torch.randn(rows, shape[1]))
    assert max(shards) <= 16
    assert scratch_bytes([]) == 0 and scratch_bytes([(1 << 20, 4096)]) == SCRATCH_BYTES + 1024


def test_what_a_form_cannot_do_is_refused() -> None:
    weight, _ = make(Codec(Precision.INT4, 64))
    with pytest.raises(PlacementError, match="prepared for Linear only"):
        weight.rows(torch.tensor([0]))
    layout = Codec(Precision.INT4, 64).layout(200, 128)
    record = encode(torch.randn(40, 128), layout.codec)
    with pytest.raises(ValueError, match="multiples of 64"):
        weight.fill(0, record, layout.shard(0, 40))


@pytest.mark.parametrize("precision", [Precision.BF16, Precision.INT6, Precision.INT8])
def test_without_bf16_units_many_rows_are_multiplied_in_fp32(
    precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoded, "cpu_computes_bf16", lambda: False)
    for streamed in (False, True):
        weight, decoded = make(Codec(precision), streamed=streamed)
        x = torch.randn(40, 128)
        torch.testing.assert_close(weight.linear(x), x @ decoded.t(), rtol=1e-4, atol=1e-5)
