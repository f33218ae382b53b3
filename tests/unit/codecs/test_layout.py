import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.codecs.layout import (
    ALIGNMENT,
    GROUP_SIZES,
    HEADER_BYTES,
    PLANE_BITS,
    RAW_BITS,
    Codec,
    default_codec,
)
from lib.errors import InputError
from lib.vocabulary import Precision

CODECS = [Codec(precision, size) for precision in PLANE_BITS for size in GROUP_SIZES] + [
    Codec(precision) for precision in RAW_BITS
]
SIZES = st.integers(1, 1000)


@given(codec=st.sampled_from(CODECS), rows=SIZES, cols=SIZES)
def test_sections_are_aligned_in_order_and_disjoint(codec: Codec, rows: int, cols: int) -> None:
    layout = codec.layout(rows, cols)
    ends = HEADER_BYTES
    parameters = [
        (layout.scales_offset, layout.parameters_bytes),
        (layout.zeros_offset, layout.parameters_bytes),
    ]
    planes = [(plane.offset, rows * plane.row_bytes) for plane in layout.planes]
    for offset, num_bytes in parameters + planes:
        assert offset % ALIGNMENT == 0
        assert ends <= offset < ends + ALIGNMENT
        ends = offset + num_bytes
    assert layout.num_bytes == -(-ends // ALIGNMENT) * ALIGNMENT
    assert sum(plane.bits for plane in layout.planes) == codec.bits


@given(codec=st.sampled_from(CODECS), rows=SIZES, cols=SIZES, data=st.data())
def test_ranges_of_rows_partition_the_record(
    codec: Codec, rows: int, cols: int, data: st.DataObject
) -> None:
    layout = codec.layout(rows, cols)
    cut = data.draw(st.integers(0, rows))
    parts = [(start, end) for start, end in ((0, cut), (cut, rows)) if start < end]
    covered = [
        (here, length) for start, end in parts for here, _, length in layout.row_ranges(start, end)
    ]
    whole = [(here, length) for here, _, length in layout.row_ranges(0, rows)]
    assert sum(length for _, length in covered) == sum(length for _, length in whole)
    for start, end in parts:
        assert layout.shard(start, end) == codec.layout(end - start, cols)


def test_bytes_per_weight_of_the_default_codecs() -> None:
    expected = {
        "fp32": 4, "bf16": 2, "fp16": 2, "int8": 1.0039, "int6": 0.8125, "int5": 0.6875,
        "int4": 0.5625, "int3": 0.4375, "int2": 0.3125,
    }  # fmt: skip
    for precision in Precision:
        layout = default_codec(precision).layout(4096, 1024)
        assert layout.num_bytes / 4096 / 1024 == pytest.approx(expected[precision], abs=1e-4)


def test_a_prefix_is_as_long_as_the_lower_precision() -> None:
    layout = Codec(Precision.INT8, 64).layout(100, 256)
    for precision in (Precision.INT4, Precision.INT6, Precision.INT8):
        prefix = layout.prefix(precision)
        assert prefix.num_bytes == Codec(precision, 64).layout(100, 256).num_bytes
        assert prefix.bits + prefix.dropped_bits == 8


@pytest.mark.parametrize(
    ("stored", "wanted", "allowed"),
    [
        (Precision.INT8, Precision.INT5, "int8, int6, int4"),
        (Precision.INT4, Precision.INT2, "int4"),
        (Precision.INT4, Precision.INT8, "int4"),
        (Precision.BF16, Precision.INT8, "bf16"),
    ],
)
def test_what_is_no_prefix_is_refused(stored: Precision, wanted: Precision, allowed: str) -> None:
    with pytest.raises(InputError, match=f"allowed are {allowed}$"):
        Codec(stored).layout(4, 4).prefix(wanted)


def test_impossible_shapes_groups_and_rows_are_refused() -> None:
    with pytest.raises(InputError, match="group size 48"):
        Codec(Precision.INT4, 48)
    with pytest.raises(InputError, match="group size 64 of bf16: allowed are 0"):
        Codec(Precision.BF16, 64)
    with pytest.raises(InputError, match="0 x 4"):
        Codec(Precision.INT4).layout(0, 4)
    with pytest.raises(InputError, match="rows 2 to 9"):
        Codec(Precision.INT4).layout(8, 4).row_ranges(2, 9)


def test_the_layout_needs_no_torch() -> None:
    code = "import sys, lib.codecs.layout; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[3],
    )
    assert done.stdout.strip() == "False"
