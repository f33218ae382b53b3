import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.nn import functional as F

from lib.codecs import expansion, ops
from lib.codecs.expansion import Expansion
from lib.codecs.fused import Int4Weight, Int8Weight
from lib.codecs.kernels import (
    SCRATCH_BYTES,
    CompressedWeight,
    EncodedWeight,
    Scratch,
    Use,
    empty_weight,
    prepare,
    resident_bytes,
    scratch_bytes,
)
from lib.codecs.layout import PLANE_BITS, RAW_BITS
from lib.codecs.native import INSTRUCTIONS, VARIABLE
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


def test_our_kernels_take_every_record_as_it_is() -> None:
    if ops.prepare("cpu") == "reference":
        pytest.skip("our kernels were not built")
    for codec, uses in itertools.product(CODECS, (LINEAR, EMBEDDING, BOTH)):
        assert isinstance(make(codec, uses=uses)[0], EncodedWeight)


def test_which_form_is_held_without_our_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "prepare", lambda device: "reference")
    int4, int8 = Codec(Precision.INT4, 64), Codec(Precision.INT8)
    assert isinstance(make(int4)[0], Int4Weight)
    assert isinstance(make(int4, uses=BOTH)[0], EncodedWeight)
    assert isinstance(make(int4, cols=100)[0], EncodedWeight)  # the kernel wants whole groups
    assert isinstance(make(int8, uses=BOTH)[0], Int8Weight)
    assert isinstance(make(Codec(Precision.INT6, 64))[0], EncodedWeight)


@pytest.mark.parametrize("codec", [codec for codec in CODECS if not codec.is_raw], ids=str)
def test_few_rows_cost_no_more_than_int16_activations(codec: Codec) -> None:
    if ops.prepare("cpu") == "reference":
        pytest.skip("our kernels were not built")
    shapes = (3, 1), (5, 33), (65, 100), (7, 576), (2, 1000), (9, 2048), (5, 2336), (6, 4096)
    for rows, cols in shapes:
        weight, decoded = make(codec, rows, cols)
        x = torch.randn(32, cols)
        x[1] *= 1e-20
        x[2, 0] = 1e6
        y, bias = weight.linear(x), torch.randn(rows)
        expected = x.double() @ decoded.double().t()
        # A block of 64 activations has a scale: half a step of it, and float32 sums.
        blocks = F.pad(x, (0, -cols % 64)).view(32, -1, 64).abs().amax(2)
        peak = blocks.repeat_interleave(64, 1)[:, :cols].double()
        room = (peak / 65024 + x.double().abs() * 2**-20) @ decoded.double().abs().t()
        assert ((y - expected).abs() <= room + 1e-37).all()
        # What else is in the batch makes no difference, nor where a row is.
        assert all(torch.equal(y[m : m + 1], weight.linear(x[m : m + 1])) for m in (0, 2, 31))
        assert torch.equal(y[5:12], weight.linear(x[5:12]))
        torch.testing.assert_close(weight.linear(x, bias), y + bias)


@pytest.mark.parametrize("cols", [1, 7, 40, 100, 576])
def test_few_rows_of_bf16_weights_are_multiplied_in_fp32(cols: int) -> None:
    weight, _ = make(Codec(Precision.BF16), 37, cols)
    bias = torch.randn(37)
    exact = weight.expand(0, 37).double()
    for shape in ((cols,), (1, cols), (2, 3, cols), (0, cols)):
        x = torch.randn(*shape)
        y = weight.linear(x, bias)
        expected = x.double() @ exact.t() + bias
        room = x.double().abs() @ exact.t().abs() + bias.abs()
        assert y.dtype == x.dtype and y.shape == (*shape[:-1], 37)
        assert ((y - expected).abs() <= 2.0**-20 * room).all()
    both = torch.randn(2, cols)
    halves = weight.linear(both.bfloat16(), bias.bfloat16())
    assert halves.dtype == torch.bfloat16
    if ops.prepare("cpu") == "native":
        assert torch.equal(weight.linear(both)[1:], weight.linear(both[1:]))
        with pytest.raises(RuntimeError, match="a bias of 37 elements was expected"):
            weight.linear(both, torch.ones(1))
        given = torch.randn(2, cols), torch.randn(5, cols).bfloat16(), torch.randn(5)
        torch.library.opcheck(torch.ops.tierhints.linear_bf16, given)


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_each_set_of_instructions(instructions: str) -> None:
    if ops.prepare("cpu") == "reference":
        pytest.skip("our kernels were not built")
    attention = str(Path(__file__).with_name("test_attend.py"))
    pages = str(Path(__file__).parents[1] / "progressive" / "kv" / "test_page_attention.py")
    command = [sys.executable, "-m", "pytest", "-q", __file__, attention, pages]
    command += ["-k", "few_rows or not_finite or operators or test_attend or softmax_does"]
    command += ["-p", "no:cacheprovider"]
    environment = {**os.environ, VARIABLE: instructions, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "this processor doesn't have" in found.stdout:
        pytest.skip(f"no {instructions} here")
    assert found.returncode == 0, found.stdout


def test_what_is_not_finite_makes_products_so() -> None:
    for num_rows, value in itertools.product((1, 40), (torch.inf, -torch.inf, torch.nan)):
        weight, _ = make(Codec(Precision.INT4, 64), 8, 128)
        x = torch.randn(num_rows, 128)
        x[0, 70] = value
        y = weight.linear(x)
        assert not y[0].isfinite().any() and y[1:].isfinite().all()


@pytest.mark.parametrize("num_rows", [0, 1, 5, 40])
def test_several_matrices_are_multiplied_as_each_alone(num_rows: int) -> None:
    codec, scratch = Codec(Precision.INT4, 64), 1 << 16
    ops.prepare("cpu")
    rows, biases = [130, 3, 70], [torch.randn(130), None, torch.randn(70)]
    records = [encode(torch.randn(n, 100), codec) for n in rows]
    layout = ops.layout_arguments(codec.layout(1, 100))[1:]
    x = torch.randn(num_rows, 100)
    namespace = torch.ops.tierhints
    whole = namespace.linears(x, records, biases, rows, *layout, scratch)
    each = [
        namespace.linear(x, record, bias, n, *layout, scratch)
        for record, bias, n in zip(records, biases, rows, strict=True)
    ]
    assert torch.equal(whole, torch.cat(each, -1))


@pytest.mark.parametrize("bits", [8, 6, 5, 4, 3, 2])
def test_operators_are_what_torch_expects_of_them(bits: int) -> None:
    codec = Codec(ops._PRECISIONS[bits], 64)
    layout = ops.layout_arguments(codec.layout(6, 100))
    ops.prepare("cpu")
    record, x, bias = encode(torch.randn(6, 100), codec), torch.randn(2, 3, 100), torch.randn(6)
    namespace = torch.ops.tierhints
    opcheck(namespace.linear.default, (x, record, bias, *layout, 1 << 16))
    several = [record, record], [bias, None], [6, 6]
    opcheck(namespace.linears.default, (x, *several, *layout[1:], 1 << 16))
    opcheck(namespace.rows.default, (torch.tensor([[1, 5]]), record, *layout, torch.bfloat16))
    opcheck(namespace.decode.default, (record, *layout, 2, 5, torch.float32))
    with pytest.raises((IndexError, RuntimeError), match="out of range"):
        namespace.rows(torch.tensor([6]), record, *layout, torch.float32)


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


def test_the_int4_kernel_computes_from_the_prefix_of_an_int8_record(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    codec = Codec(Precision.INT8, 64)
    values = torch.randn(100, 128)
    prefix = codec.layout(100, 128).prefix(Precision.INT4)
    record = encode(values, codec)[: prefix.num_bytes]
    monkeypatch.setattr(ops, "prepare", lambda device: "reference")
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
    small, large, tiny = (
        Expansion(record, layout, dtype=torch.float32, scratch=Scratch(size))
        for size in (4096, 1 << 20, 2048 + 100)
    )
    torch.testing.assert_close(small.linear(x), large.linear(x), rtol=0, atol=0.2)
    torch.testing.assert_close(small.linear(x[:1]), large.linear(x[:1]))
    assert torch.equal(small.expand(0, 500), large.expand(0, 500))
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
    monkeypatch.setattr(ops, "prepare", lambda device: "reference")
    weights: list[CompressedWeight | Expansion] = [
        prepare(record, layout, dtype=torch.float32, device="cpu", uses=uses, scratch=scratch)
        for uses in (LINEAR, EMBEDDING, BOTH)
    ]
    weights.append(Expansion(record, layout, dtype=torch.float32, scratch=scratch))
    for weight in weights:
        weight.expand(0, shape[0])
        for rows in (1, 3, 40):
            weight.linear(torch.randn(rows, shape[1]))
    assert max(shards) <= 16
    assert scratch_bytes([]) == 0 and scratch_bytes([(1 << 20, 4096)]) == SCRATCH_BYTES + 1024


def test_what_a_form_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "prepare", lambda device: "reference")
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
    monkeypatch.setattr(expansion, "cpu_computes_bf16", lambda: False)
    codec = Codec(precision)
    record, layout = encode(torch.randn(200, 128) * 0.02, codec), codec.layout(200, 128)
    decoded, x = decode(record, layout), torch.randn(40, 128)
    weights: list[CompressedWeight | Expansion] = [
        Int8Weight(
            layout, dtype=torch.float32, device=torch.device("cpu"), scratch=Scratch(1 << 17)
        ),
        Expansion(record, layout, dtype=torch.float32, scratch=Scratch(1 << 17)),
    ]
    for weight in weights:
        if isinstance(weight, Int8Weight):
            if precision is not Precision.INT8:
                continue
            weight.fill(0, record, layout)
        torch.testing.assert_close(weight.linear(x), x @ decoded.t(), rtol=1e-4, atol=1e-5)
