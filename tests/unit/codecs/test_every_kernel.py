"""One suite for every registered kernel, those of ``$TIERHINTS_PLUGINS`` among them."""

import itertools
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from torch import Tensor

from lib.codecs import ops
from lib.codecs.encoded import EncodedWeight
from lib.codecs.fused import Int4Weight, Int8Weight
from lib.codecs.kernels import (
    KERNELS,
    CompressedWeight,
    Scratch,
    Use,
    choose_kernel,
    kernel_name,
    register_kernel,
    resident_bytes,
    scratch_bytes,
)
from lib.codecs.layout import GROUP_SIZES, PLANE_BITS, RAW_BITS, RecordLayout
from lib.codecs.records import Codec, decode, encode
from lib.vocabulary import Precision

LINEAR, EMBEDDING = frozenset({Use.LINEAR}), frozenset({Use.EMBEDDING})
USES = [frozenset(uses) for n in range(4) for uses in itertools.combinations(Use, n)]
CPU = torch.device("cpu")
CODECS = [Codec(precision, size) for precision in PLANE_BITS for size in GROUP_SIZES] + [
    Codec(precision) for precision in RAW_BITS
]


def prefixes(layout: RecordLayout) -> Iterator[RecordLayout]:
    """Yield the layout, and those that read a part of its planes."""
    yield layout
    planes = PLANE_BITS.get(layout.precision, ())
    for precision, bits in PLANE_BITS.items():
        if len(bits) < len(planes) and planes[: len(bits)] == bits:
            yield layout.prefix(precision)


def supported(kernel: type[CompressedWeight]) -> dict[RecordLayout, frozenset[Use]]:
    """Return what a kernel takes of a grid of records, each with its most and its fewest uses."""
    found = {}
    for codec in CODECS:
        for rows, cols in ((1, 64), (70, 100), (200, 256)):
            for layout in prefixes(codec.layout(rows, cols)):
                if taken := [uses for uses in USES if kernel.supports(layout, uses, CPU)]:
                    found[layout] = taken[0] | taken[-1]
    return found


def make(
    kernel: type[CompressedWeight], layout: RecordLayout, *, shards: int = 1
) -> tuple[CompressedWeight, Tensor]:
    """Return a filled weight and what the reference decodes."""
    scratch = Scratch(scratch_bytes([(layout.rows, layout.cols)]))
    weight = kernel.allocate(layout, dtype=torch.float32, device=CPU, scratch=scratch)
    step = -(-layout.rows // shards // 64) * 64
    for start in range(0, layout.rows, step):
        end = min(start + step, layout.rows)
        part = layout.shard(start, end)
        record = record_of(layout.codec, layout.cols, start, end)[: part.num_bytes].clone()
        weight.fill(start, record, part)
        record.fill_(255)  # nothing of it may be kept
    torch.manual_seed(layout.rows + layout.cols)
    return weight, weights_of(layout)


@cache
def record_of(codec: Codec, cols: int, start: int, end: int) -> Tensor:
    values = torch.randn(256, cols, generator=torch.Generator().manual_seed(cols)) * 0.02 + 0.005
    return encode(values[start:end], codec)


@cache
def weights_of(layout: RecordLayout) -> Tensor:
    record = record_of(layout.codec, layout.cols, 0, layout.rows)
    return decode(record[: layout.num_bytes], layout)


@pytest.fixture(params=list(KERNELS))
def kernel(request: pytest.FixtureRequest) -> type[CompressedWeight]:
    found = KERNELS[request.param]
    if not supported(found):
        pytest.skip(f"{found.name} takes nothing on a CPU")
    return found


def test_it_computes_what_the_reference_decodes_within_its_bound(
    kernel: type[CompressedWeight],
) -> None:
    for layout, uses in supported(kernel).items():
        weight, decoded = make(kernel, layout)
        shape = (layout.rows, layout.cols)
        assert weight.shape == shape and weight.dtype == torch.float32
        bias = torch.randn(layout.rows)
        for num_rows in (0, 1, 5, 40) if Use.LINEAR in uses else ():
            x = torch.randn(2, num_rows, layout.cols)
            y = weight.linear(x, bias)
            expected = x.double() @ decoded.double().t() + bias
            room = x.double().abs() @ decoded.double().abs().t() + bias.abs() + 1e-30
            assert y.shape == (2, num_rows, layout.rows) and y.dtype == x.dtype
            assert ((y - expected).abs() <= kernel.linear_error * room).all(), (layout, uses)
        bound = kernel.decoding_error * decoded.abs().max()
        for start, end in ((0, layout.rows), (layout.rows // 2, layout.rows)):
            error = weight.expand(start, end) - decoded[start:end]
            assert error.abs().max() <= bound, (layout, uses)
        assert weight.looks_up or Use.EMBEDDING not in uses
        if weight.looks_up:
            ids = torch.tensor([[0, layout.rows - 1], [layout.rows // 2, 0]])
            assert (weight.rows(ids) - decoded[ids]).abs().max() <= bound, (layout, uses)


def test_it_holds_the_bytes_that_are_planned(kernel: type[CompressedWeight]) -> None:
    for layout in supported(kernel):
        weight, _ = make(kernel, layout)
        assert weight.num_bytes == kernel.planned_bytes(layout), layout


def test_it_is_the_same_filled_by_shards(kernel: type[CompressedWeight]) -> None:
    for layout in supported(kernel):
        (whole, _), (parts, _) = make(kernel, layout), make(kernel, layout, shards=3)
        x = torch.randn(3, layout.cols)
        assert torch.equal(whole.linear(x), parts.linear(x)), layout
        assert torch.equal(whole.expand(0, layout.rows), parts.expand(0, layout.rows)), layout


def test_half_precision_comes_back(kernel: type[CompressedWeight]) -> None:
    layout, uses = list(supported(kernel).items())[-1]
    weight, decoded = make(kernel, layout)
    if Use.LINEAR in uses:
        x = torch.randn(3, layout.cols).bfloat16()
        assert weight.linear(x).dtype == torch.bfloat16
    assert weight.expand(0, 1).dtype == decoded.dtype


def expected_kernel(layout: RecordLayout, uses: frozenset[Use], device: str) -> type:
    """Say by a table of its own what our kernels take where the record itself isn't the fastest: by
    rows, by groups, or anything.
    """
    if layout.precision is Precision.INT8 and layout.codec.group_size == 0:
        return Int8Weight
    whole_groups = layout.codec.group_size > 0 and layout.cols % layout.codec.group_size == 0
    tinygemm = device == "cpu" or layout.cols % 32 == 0
    fits = layout.precision is Precision.INT4 and whole_groups and tinygemm
    return Int4Weight if fits and uses == LINEAR else EncodedWeight


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_which_of_ours_is_chosen_without_kernels_of_our_own(
    codec: Codec, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "prepare", lambda device: "reference")
    for rows, cols, uses in itertools.product((1, 200), (32, 64, 100, 192, 256, 320), USES):
        for layout in prefixes(codec.layout(rows, cols)):
            if layout.codec.group_size == 0 and layout.precision is Precision.INT4:
                continue  # its only group is a row, of a size that a kernel may have: below
            chosen = choose_kernel(layout, uses, torch.device(device))
            assert chosen is expected_kernel(layout, uses, device), (layout, uses)
        planned = resident_bytes(rows, cols, codec, uses, device)
        chosen = choose_kernel(codec.layout(rows, cols), uses, torch.device(device))
        assert planned == chosen.planned_bytes(codec.layout(rows, cols))


def test_a_row_may_be_a_group_of_the_int4_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "prepare", lambda device: "reference")
    codec = Codec(Precision.INT4, 0)
    assert choose_kernel(codec.layout(8, 64), LINEAR, CPU) is Int4Weight
    assert choose_kernel(codec.layout(8, 320), LINEAR, CPU) is EncodedWeight


def test_the_kernel_that_was_registered_last_is_asked_first() -> None:
    layout = Codec(Precision.INT8).layout(8, 64)
    first = choose_kernel(layout, LINEAR, CPU)
    name = kernel_name("cpu", torch.float32)
    with KERNELS.restored():

        @register_kernel
        class MyInt8(EncodedWeight):
            name = "my int8"

            @classmethod
            def supports(
                cls, layout: RecordLayout, uses: frozenset[Use], device: torch.device
            ) -> bool:
                return super().supports(layout, uses, device) and uses == LINEAR

        assert choose_kernel(layout, LINEAR, CPU) is MyInt8
        assert choose_kernel(layout, EMBEDDING, CPU) is first
        # What was measured without it is another.
        assert kernel_name("cpu", torch.float32) == f"{name}, my int8"
    assert choose_kernel(layout, LINEAR, CPU) is first
