"""The bytes of a payload, made from weights, and the key that names them."""

import math
from collections.abc import Callable, Iterator, Mapping

import torch
import xxhash
from torch import Tensor

from ...codecs.records import RecordLayout, encode_from
from ...codecs.storage import name_weights
from ...errors import InputError
from .layout import _PART_BYTES, Payload, Shard
from .parts import Part

_FORMAT = 4
"""The version of payloads and of their records: with a new one, what earlier versions stored isn't
read.
"""


Reader = Callable[[str, int | None, int | None], Tensor]
"""Reads a parameter's native weights, or rows [start, end) of them, to host memory."""

Piece = tuple[Part, int, Tensor, RecordLayout | None]
"""(part, first row, record, its layout), or the whole weights of a part that is not encoded,
without a layout.
"""


def payload_bytes(payload: Payload, read: Reader) -> Iterator[Tensor]:
    """Yield the payload as uint8 tensors in order; holds a record or 8 MiB of weights at a time."""
    end = 0
    if payload.by_rows:
        for shard in payload.shards:
            yield from _padding(shard.offset - end)
            if shard.record is None:
                yield flat_bytes(read(payload.parts[0].parameter, shard.start, shard.end))
            else:
                yield _encode_shard(payload, shard, shard.record, read)
            end = shard.offset + shard.data_bytes
    else:
        for part in payload.parts:
            yield from _padding(part.offset - end)
            if part.record is not None:
                yield _encode_part(payload, part, part.record, read)
            elif part.is_contiguous and part.expert is None:
                for start, stop in _row_steps(part):
                    yield flat_bytes(read(part.parameter, start, stop))
            else:
                yield flat_bytes(read_part(part, read))
            end = part.offset + part.num_bytes
    yield from _padding(payload.num_bytes - end)


def payload_pieces(payload: Payload, read: Reader) -> Iterator[Piece]:
    """Yield what goes into a payload."""
    if payload.by_rows:
        part = payload.parts[0]
        for shard in payload.shards:
            if shard.record is None:
                data = read(part.parameter, shard.start, shard.end)
            else:
                data = _encode_shard(payload, shard, shard.record, read)
            yield part, shard.start, data, shard.record
        return
    for part in payload.parts:
        if part.record is None:
            data = read_part(part, read)
            # Rows may be lent until the next are read, and what is yielded is to stay.
            yield part, 0, data if part.expert is None else data.clone(), None
        else:
            yield part, 0, _encode_part(payload, part, part.record, read), part.record


def read_part(part: Part, read: Reader) -> Tensor:
    """Read the whole of a part."""
    if part.expert is None:
        return read(part.parameter, None, None)
    return read(part.parameter, part.expert, part.expert + 1)[0]


def content_key(payload: Payload, identities: Mapping[str, str]) -> str:
    """Name a payload by what is in it: layout, codec, and the identity of each parameter's
    weights.
    """
    digest = xxhash.xxh3_128(f"format {_FORMAT};{payload.by_rows}|".encode())
    for shard in payload.shards:
        digest.update(f"{shard.start}-{shard.end}@{shard.offset}+{shard.num_bytes}|".encode())
    for part in payload.parts:
        codec = part.codec
        text = (
            f"{part.offset};{tuple(part.shape)};{part.stride};{part.dtype};{part.transposed};"
            f"{codec.precision if codec else 'raw'};{codec.group_size if codec else 0};"
            f"{identities[part.parameter]}|"
        )
        if part.expert is not None:
            text += f"expert {part.expert}|"
        digest.update(text.encode())
    return digest.hexdigest()


def part_view(buffer: Tensor, part: Part) -> Tensor:
    """Return a raw part's weights as a view into its payload's bytes."""
    flat = buffer[part.offset : part.offset + part.num_bytes].view(part.dtype)
    return flat.as_strided(part.shape, part.stride, flat.storage_offset())


def _padding(num_bytes: int) -> Iterator[Tensor]:
    if num_bytes:
        yield torch.zeros(num_bytes, dtype=torch.uint8)


def flat_bytes(weights: Tensor) -> Tensor:
    """View dense weights as bytes in memory order."""
    flat = weights.as_strided((weights.numel(),), (1,), weights.storage_offset())
    return flat.view(torch.uint8)


def _encode_part(payload: Payload, part: Part, layout: RecordLayout, read: Reader) -> Tensor:
    """Return a parameter's record, made from its native weights a few rows at a time."""
    name, blocks = part.parameter, payload.group.blocks
    try:
        if len(part.shape) == 2 and not part.transposed and part.expert is None:
            return encode_from(lambda a, b: read(name, a, b), layout, part.dtype)
        weights = read_part(part, read)
        matrix = weights.t() if part.transposed else weights.reshape(-1, layout.cols)
        return encode_from(lambda a, b: matrix[a:b], layout, part.dtype)
    except InputError as error:
        first, expert = part.expert or 0, part.expert
        whole = read(name, None, None) if expert is None else read(name, expert, expert + 1)
        raise name_weights(error, name, blocks, whole, layout.codec, first_row=first) from error


def _encode_shard(payload: Payload, shard: Shard, layout: RecordLayout, read: Reader) -> Tensor:
    """Return the record of a shard's rows, made a few rows at a time."""
    (part,) = payload.parts
    name, first = part.parameter, shard.start
    try:
        return encode_from(lambda a, b: read(name, first + a, first + b), layout, part.dtype)
    except InputError as error:
        blocks, weights = payload.group.blocks, read(name, first, shard.end)
        codec = layout.codec
        raise name_weights(error, name, blocks, weights, codec, first_row=first) from error


def _row_steps(part: Part) -> Iterator[tuple[int | None, int | None]]:
    """Cut a parameter into ranges of its first dimension of about 8 MiB."""
    if len(part.shape) < 2:
        yield None, None
        return
    row_bytes = math.prod(part.shape[1:]) * part.dtype.itemsize
    step = max(_PART_BYTES // max(row_bytes, 1), 1)
    for start in range(0, part.shape[0], step):
        yield start, min(start + step, part.shape[0])
