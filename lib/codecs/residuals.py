"""Residuals: what records lack of the weights that they were made from, bit for bit.

A code says in which interval its weight lies: scale and zero are known. Of the bfloat16 numbers in
that interval, in their order, the weight is number ``rank``; as many bits as the largest rank takes
are stored, which the code alone tells, so that ranks lie one after another without their lengths. A
weight outside its interval (float32's rounding) is an *escape*: its place and its bits. Of float32
weights this is the upper half, and the lower half is stored as it is.

A payload is coded in chunks of CHUNK_BYTES, each by itself: escapes (u32 how many; u32 place and
u16 bits each), then what lies in the chunk, in order: bytes that no record knows of as they are,
and of a part with a record the lower halves, and the ranks, up to a whole byte. A chunk that
doesn't get smaller is stored as it is (0xffffffff in the place of the number).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import torch
import xxhash
from torch import Tensor

from ..vocabulary import Precision
from .layout import RecordLayout, default_codec
from .native import load_native
from .records import encode

CHUNK_BYTES = 256 * 2**10
"""Bytes of a payload that are coded by themselves."""
DTYPES = (torch.bfloat16, torch.float32)
"""Of weights that residuals are made of."""
RANK_BITS = {
    Precision.INT8: 3.9,
    Precision.INT6: 5.4,
    Precision.INT5: 6.8,
    Precision.INT4: 8.1,
    Precision.INT3: 9.4,
    Precision.INT2: 10.6,
}
"""Bits of a packed rank, about, of trained weights (docs/exact.md); those of float32 have 16 more.
"""
_VERSION = 1
_SLACK = CHUNK_BYTES + 64
"""What may be read beyond a damaged chunk."""
_HEAD_BYTES = 4
_TIMED_ROWS, _TIMED_COLS, _ROUNDS = 1024, 1024, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownRows:
    """Rows [start, end) of a matrix, which lie at ``offset`` in a payload, and its record."""

    offset: int
    start: int
    end: int
    dtype: torch.dtype
    layout: RecordLayout
    record: Tensor

    @property
    def fields(self) -> tuple[int, ...]:
        """What the operators take of it."""
        rows, cols, item = self.layout.rows, self.layout.cols, self.dtype.itemsize
        num_bytes, codec = (self.end - self.start) * cols * item, self.layout.codec
        return self.offset, num_bytes, item, rows, cols, codec.group_size, codec.bits, self.start


class Residuals:
    """The residuals of a payload of which some parts have records, in the order of the parts."""

    def __init__(self, parts: Sequence[KnownRows]) -> None:
        assert load_native().library is not None
        self._records = [part.record for part in parts]
        self._fields = [field for part in parts for field in part.fields]

    @property
    def identity(self) -> str:
        """What decides how bytes are coded, apart from the bytes."""
        digest = xxhash.xxh3_128(f"residuals {_VERSION} {self._fields}".encode())
        for record in {id(each): each for each in self._records}.values():
            digest.update(record.numpy().data)
        return digest.hexdigest()

    def encode(self, payload: Tensor, start: int) -> list[Tensor]:
        """Code bytes of the payload from ``start`` on (a multiple of CHUNK_BYTES): a tensor for
        each chunk. What they decode to was compared.
        """
        count = -(-len(payload) // CHUNK_BYTES)
        room = torch.empty(count, CHUNK_BYTES + _HEAD_BYTES, dtype=torch.uint8, device="cpu")
        sizes = torch.ops.tierhints.encode_residuals(
            payload, start, self._records, self._fields, room.view(-1)
        ).tolist()
        chunks = [row[:size] for row, size in zip(room, sizes, strict=True)]
        again = torch.empty_like(payload)
        assert self.decode(*join_chunks(chunks), start, again) is None
        assert torch.equal(payload, again)
        return chunks

    def decode(self, stream: Tensor, ends: Sequence[int], start: int, out: Tensor) -> int | None:
        """Make ``out``, a payload's bytes from ``start`` on, of chunks that end in the stream where
        ``ends`` says, which begins with where the first one starts; ``stream_bytes`` says how long
        it is, at least. Returns the first chunk that isn't sound, if any. The threads of torch are
        left alone.
        """
        bad: int = torch.ops.tierhints.decode_residuals(
            stream, ends, start, self._records, self._fields, out
        )
        return None if bad < 0 else bad


def join_chunks(chunks: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """Return chunks one after another, as they are decoded from, and where they end."""
    ends = [0, *accumulate(map(len, chunks))]
    stream = torch.zeros(stream_bytes(ends[-1]), dtype=torch.uint8, device="cpu")
    torch.cat(list(chunks), out=stream[: ends[-1]])
    return stream, ends


def stream_bytes(coded_bytes: int) -> int:
    """Return the memory in which so many bytes of chunks are decoded from."""
    return coded_bytes + _SLACK


def coded_bytes(payload_bytes: int) -> int:
    """Return what chunks of so many bytes take at most."""
    return payload_bytes + -(-payload_bytes // CHUNK_BYTES) * _HEAD_BYTES


@cache
def decode_rate() -> float:
    """Measure the weights per second that one thread makes of int8 records and residuals; 0 without
    the extension.
    """
    if load_native().library is None:
        return 0.0
    generator = torch.Generator().manual_seed(0)
    shape = _TIMED_ROWS, _TIMED_COLS
    weights = torch.randn(*shape, generator=generator, device="cpu").bfloat16()
    codec = default_codec(Precision.INT8)
    part = KnownRows(
        offset=0,
        start=0,
        end=len(weights),
        dtype=weights.dtype,
        layout=codec.layout(*weights.shape),
        record=encode(weights, codec),
    )
    residuals = Residuals([part])
    payload = weights.view(torch.uint8).view(-1)
    chunks = residuals.encode(payload, 0)
    stream, ends = join_chunks(chunks)
    out, seconds = torch.empty_like(payload), []
    for _ in range(_ROUNDS):
        began = time.thread_time()
        residuals.decode(stream, ends, 0, out)
        seconds.append(time.thread_time() - began)
    return weights.numel() / max(min(seconds), 1e-9)
