"""The bytes of records: those that earlier versions wrote, which stores keep for later runs."""

import pytest
import torch
import xxhash
from torch import Tensor

from lib.codecs.quantize import Workspace, quantize_rows
from lib.codecs.records import default_codec, encode, section_views
from lib.vocabulary import Precision

SHAPES = [(5, 64), (3, 100), (70, 576), (1, 7), (600, 2048)]
WRITTEN = {
    Precision.FP32: "866e7a6117236183",
    Precision.BF16: "0e8ea157ed2a60f0",
    Precision.FP16: "2038a1b5ee36b83f",
    Precision.INT8: "2b6cc76f21db6dbf",
    Precision.INT6: "ae1509ff0df38a73",
    Precision.INT5: "82f89b4ff41955ca",
    Precision.INT4: "1149ee41a2c93a29",
    Precision.INT3: "91393b1efa4194ef",
    Precision.INT2: "2a07a90c008b48bc",
}


def exact_weights(rows: int, cols: int) -> Tensor:
    """Weights with the same bits on every machine: rows of very different scale, groups of equal
    weights, ties between two codes.
    """
    numbers = torch.arange(rows * cols, dtype=torch.int64)
    for _ in range(2):
        numbers = (numbers * 1103515245 + 12345) % 2**31
    weights = (((numbers >> 8) % 65536 - 32768).float() / 32768).view(rows, cols) ** 3
    weights *= torch.tensor([1.0, 2.0**-30, 2.0**20, 2.0**-90]).repeat(rows)[:rows, None]
    weights[0, :64] = 0.5
    if rows > 2:
        weights[2] = torch.round(weights[2] * 8) / 8
    return weights.clamp(-60000, 60000)


@pytest.mark.parametrize("precision", Precision)
def test_records_have_the_bytes_that_others_of_their_version_have(precision: Precision) -> None:
    digest = xxhash.xxh3_64()
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            record = encode(exact_weights(*shape).to(dtype), default_codec(precision))
            digest.update(record.numpy().tobytes())
    assert digest.hexdigest() == WRITTEN[precision]


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.INT5, Precision.INT3])
def test_a_workspace_leaves_nothing_to_the_next_rows(precision: Precision) -> None:
    codec = default_codec(precision)
    weights = exact_weights(70, 100)
    layout = codec.layout(70, 100)
    record = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    before = weights.clone()
    work = Workspace(layout, 32)
    for start in range(0, 70, 32):
        sections = [view[start : start + 32] for view in section_views(record, layout)]
        quantize_rows(weights[start : start + 32], sections, layout, work, first=start)
    expected = section_views(encode(weights, codec), layout)
    assert all(map(torch.equal, section_views(record, layout), expected))
    assert torch.equal(weights, before)
