"""Residuals: weights come back bit for bit from their records and what is stored beside them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lib.codecs.native import load_native
from lib.codecs.records import Codec, encode
from lib.codecs.residuals import (
    CHUNK_BYTES,
    DTYPES,
    RANK_BITS,
    KnownRows,
    Residuals,
    decode_rate,
    join_chunks,
)
from lib.vocabulary import Precision

pytestmark = pytest.mark.skipif(load_native().library is None, reason="the extension isn't there")
SHAPES = ((1, 1, 0), (3, 63, 64), (700, 577, 64), (600, 1000, 32), (129, 1024, 0), (64, 65, 0))


def make_weights(rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """Return weights among which are both zeros, denormal and large numbers, as many as fit."""
    generator = torch.Generator().manual_seed(rows)
    scales = torch.rand(rows, 1, generator=generator) * 3
    weights = (torch.randn(rows, cols, generator=generator) * scales).to(dtype)
    odd = torch.tensor([-0.0, 0.0, 1e-40, -1e-39, 1e-38, 70.0], dtype=dtype)
    count = min(len(odd), weights.numel())
    weights.view(-1)[:count] = odd[:count]
    return weights


def known_rows(weights: Tensor, codec: Codec, offset: int = 0, start: int = 0) -> KnownRows:
    """Return rows of a matrix, from ``start`` on, with the record of all of it."""
    layout, record = codec.layout(*weights.shape), encode(weights, codec)
    return KnownRows(
        offset=offset,
        start=start,
        end=len(weights),
        dtype=weights.dtype,
        layout=layout,
        record=record,
    )


def flat(weights: Tensor) -> Tensor:
    return weights.contiguous().view(torch.uint8).view(-1)


def decoded(how: Residuals, chunks: list[Tensor], start: int, size: int) -> Tensor | None:
    stream, ends = join_chunks(chunks)
    out = torch.zeros(size, dtype=torch.uint8)
    return out if how.decode(stream, ends, start, out) is None else None


@pytest.mark.parametrize("precision", RANK_BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_come_back_bit_for_bit(dtype: torch.dtype, precision: Precision) -> None:
    for rows, cols, group in SHAPES:
        weights = make_weights(rows, cols, dtype)
        payload = torch.cat([torch.arange(256, dtype=torch.uint8), flat(weights), torch.ones(130)])
        payload = payload.to(torch.uint8)
        how = Residuals([known_rows(weights, Codec(precision, group), offset=256)])
        chunks = how.encode(payload, 0)
        again = decoded(how, chunks, 0, len(payload))
        assert again is not None and torch.equal(again, payload)


def test_chunks_are_decoded_by_themselves_and_from_any_row() -> None:
    weights = make_weights(700, 577, torch.bfloat16)
    how = Residuals([known_rows(weights, Codec(Precision.INT6, 64), start=100)])
    payload = flat(weights[100:])
    chunks = how.encode(payload, 0)
    assert len(chunks) == 3
    again = decoded(how, chunks[1:2], CHUNK_BYTES, CHUNK_BYTES)
    assert again is not None and torch.equal(again, payload[CHUNK_BYTES : 2 * CHUNK_BYTES])
    assert len(chunks[0]) < 0.4 * CHUNK_BYTES


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_outside_their_intervals_are_escapes(dtype: torch.dtype) -> None:
    weights = make_weights(64, 512, dtype)
    known = known_rows(weights, Codec(Precision.INT8, 0))
    changed = weights.clone()
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38, -0.0, 1e-40], dtype=dtype)
    changed[7, 100:106] = odd
    changed[-1, -1] = -300
    how, payload = Residuals([known]), flat(changed)
    chunks = how.encode(payload, 0)
    again = decoded(how, chunks, 0, len(payload))
    assert again is not None and torch.equal(again, payload)
    assert len(chunks[0]) < 0.8 * len(payload)


def test_other_weights_than_the_records_are_stored_as_they_are() -> None:
    how = Residuals([known_rows(make_weights(64, 512, torch.bfloat16), Codec(Precision.INT8, 0))])
    generator = torch.Generator().manual_seed(1)
    payload = torch.randint(0, 256, (64 * 512 * 2,), generator=generator, dtype=torch.uint8)
    chunks = how.encode(payload, 0)
    again = decoded(how, chunks, 0, len(payload))
    assert len(chunks[0]) == len(payload) + 4
    assert again is not None and torch.equal(again, payload)


def test_damaged_chunks_are_noticed_or_decode_to_other_bytes() -> None:
    weights = make_weights(300, 512, torch.bfloat16)
    how = Residuals([known_rows(weights, Codec(Precision.INT4, 64))])
    payload = flat(weights)
    chunks = how.encode(payload, 0)
    generator = torch.Generator().manual_seed(0)
    for place in [0, 1, 2, 3, *torch.randint(4, len(chunks[0]), (20,), generator=generator)]:
        damaged = [chunk.clone() for chunk in chunks]
        damaged[0][place] ^= 0x5A
        again = decoded(how, damaged, 0, len(payload))
        assert again is None or not torch.equal(again, payload)
    assert decoded(how, [chunks[0][:-1], *chunks[1:]], 0, len(payload)) is None
    assert decoded(how, [chunks[0][:2], *chunks[1:]], 0, len(payload)) is None


def test_all_instructions_decode_alike(tmp_path: Path) -> None:
    """What one processor has written another one reads."""
    weights = make_weights(129, 1000, torch.bfloat16)
    known = known_rows(weights, Codec(Precision.INT8, 0))
    chunks = Residuals([known]).encode(flat(weights), 0)
    torch.save((known.record, chunks, weights), tmp_path / "made.pt")
    code = (
        "import sys, torch; from lib.codecs.records import Codec\n"
        "from lib.vocabulary import Precision\n"
        "from lib.codecs.residuals import KnownRows, Residuals\n"
        "record, chunks, weights = torch.load(sys.argv[1])\n"
        "layout = Codec(Precision.INT8, 0).layout(*weights.shape)\n"
        "known = KnownRows(offset=0, start=0, end=len(weights), dtype=weights.dtype, "
        "layout=layout, record=record)\n"
        "again = Residuals([known]).encode(weights.view(torch.uint8).view(-1), 0)\n"
        "sys.exit(any(not torch.equal(*pair) for pair in zip(again, chunks)))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "made.pt")]
    subprocess.run(command, check=True, env={**os.environ, "TIERHINTS_NATIVE": "portable"})


def test_the_rate_of_decoding_is_measured() -> None:
    assert decode_rate() > 1e6
