"""What moves: groups of blocks, and the payload of a group, the flat bytes that a store holds of
it.

A group is one block, one expert's slices of packed parameters, or all of a module that takes these
whole. A payload holds a group's parameters one after
another, each 256-byte-aligned, padded to whole 4096-byte sectors at the end: raw (native dtype, in
memory order), or as a codec's record. A single 2-D weight that only Embedding and Linear modules
compute with is cut into shards of rows, each raw or a record by itself, which move one at a time:
memory for one shard is enough to compute with a vocabulary of any size.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...blocks import BlockKind
from ...codecs import kernels
from ...codecs.kernels import Use
from ...codecs.records import RecordLayout
from ...codecs.storage import native_precision
from ...units import SECTOR_BYTES
from ...vocabulary import Precision, precision_rank
from ..stores import CHUNK_BYTES
from .groups import Group
from .parts import Part, make_part

SHARD_ROWS = 256
"""Shards begin at multiples of this many rows and have no fewer: with it, matrix products of shards
have the bits of the whole product's (smaller ones take other kernels).
"""
_PIECE_ALIGNMENT = 256
_PART_BYTES = 8 * 2**20
"""Bytes of native weights in a shard, and read at a time while a payload is made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Rows [start, end) of a weight, or (-1, -1) a whole payload: what one transfer moves.

    ``offset`` is a multiple of CHUNK_BYTES, ``num_bytes`` of SECTOR_BYTES; ``data_bytes`` come
    without padding.
    """

    start: int
    end: int
    offset: int
    num_bytes: int
    data_bytes: int
    record: RecordLayout | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Payload:
    """The layout of a group's bytes at one precision. A payload by rows has one part."""

    group: Group
    precision: Precision
    parts: tuple[Part, ...]
    shards: tuple[Shard, ...]
    by_rows: bool
    written: bool = False
    """Its modules write to the weights (max_norm), which can't leave fast memory."""

    @property
    def num_bytes(self) -> int:
        """Bytes in a store."""
        return self.shards[-1].offset + self.shards[-1].num_bytes

    @property
    def lossy(self) -> bool:
        """Some of its weights are not those that were given."""
        return any(part.codec is not None for part in self.parts)

    @property
    def expanded_bytes(self) -> int:
        """Bytes for uses that can't compute with records: a module may take all at a time."""
        return sum(part.expanded_bytes for part in self.parts)

    @property
    def data_bytes(self) -> int:
        """Bytes without the padding."""
        return sum(shard.data_bytes for shard in self.shards)


def make_payload(
    group: Group, model: nn.Module, shapes: Mapping[str, Tensor], precision: Precision | None
) -> Payload:
    """Lay a group out. ``shapes`` has a tensor (meta will do) of each parameter; ``precision`` None
    is lossless.
    """
    modules = [model.get_submodule(name) for name in group.modules]
    written = any(getattr(module, "max_norm", None) is not None for module in modules)
    if written:
        precision = None
    plain = any(isinstance(module, nn.TransformerEncoderLayer) for module in modules)
    parts: list[Part] = []
    for name in group.parameters:
        end = parts[-1].offset + parts[-1].num_bytes if parts else 0
        offset = -(-end // _PIECE_ALIGNMENT) * _PIECE_ALIGNMENT
        packed = group.kind is BlockKind.EXPERT and shapes[name].dim() == 3
        owners = _owners(name, group, model)
        parts.append(
            make_part(
                name,
                shapes[name],
                precision,
                owners,
                offset,
                packed=packed,
                plain=plain,
                expert=group.slice,
            )
        )
    lossless = min((native_precision(part.dtype) for part in parts), key=precision_rank)
    by_rows = group.expert is None and _moves_by_rows(parts, modules)
    return Payload(
        group=group,
        precision=next((part.codec.precision for part in parts if part.codec), lossless),
        parts=tuple(parts),
        shards=tuple(_cut_rows(parts[0])) if by_rows else (_whole(parts),),
        by_rows=by_rows,
        written=written,
    )


def start_rows(num_rows: int, step: int) -> list[int]:
    """Return where to cut rows, a multiple of SHARD_ROWS at a time, so that no cut has fewer than
    those: the last takes SHARD_ROWS from the one before, or is one with it.
    """
    starts = list(range(0, num_rows, step))
    if len(starts) > 1 and num_rows - starts[-1] < SHARD_ROWS:
        starts[-1] -= SHARD_ROWS
    return list(dict.fromkeys(starts))


def _cut_rows(part: Part) -> Iterator[Shard]:
    row_bytes = part.columns * part.dtype.itemsize
    rows = max(_PART_BYTES // row_bytes // SHARD_ROWS, 1) * SHARD_ROWS
    starts = start_rows(part.rows, rows)
    offset = 0
    for start, end in zip(starts, [*starts[1:], part.rows], strict=True):
        record = part.codec.layout(end - start, part.columns) if part.codec else None
        data_bytes = record.num_bytes if record else (end - start) * row_bytes
        # Reads are whole chunks, or run to the end.
        unit = CHUNK_BYTES if end < part.rows else SECTOR_BYTES
        num_bytes = -(-data_bytes // unit) * unit
        yield Shard(
            start=start,
            end=end,
            offset=offset,
            num_bytes=num_bytes,
            data_bytes=data_bytes,
            record=record,
        )
        offset += num_bytes


def _whole(parts: list[Part]) -> Shard:
    end = parts[-1].offset + parts[-1].num_bytes
    return Shard(
        start=-1,
        end=-1,
        offset=0,
        num_bytes=max(-(-end // SECTOR_BYTES), 1) * SECTOR_BYTES,
        data_bytes=sum(part.num_bytes for part in parts),
    )


def _owners(name: str, group: Group, model: nn.Module) -> list[nn.Module]:
    """Return the modules in which a parameter is registered, under its own name and as a tied one.

    They decide how it is used: a group's module may be a container that only calls them.
    """
    parameter = model.get_parameter(name)
    tied = dict.fromkeys(alias for block in group.blocks for alias in block.tied)
    names = [name, *(alias for alias in tied if model.get_parameter(alias) is parameter)]
    return [model.get_submodule(each.rpartition(".")[0]) for each in names]


def _moves_by_rows(parts: list[Part], modules: list[nn.Module]) -> bool:
    """Say whether nothing but plain lookups and matrix products take the weights, and those have
    the same bits by rows (in float64 they don't).
    """
    return (
        len(parts) == 1
        and (parts[0].dtype != torch.float64 or parts[0].codec is not None)
        and len(parts[0].shape) == 2
        and 0 not in parts[0].shape
        and parts[0].is_contiguous
        and all(type(module) in (nn.Embedding, nn.Linear) for module in modules)
        and all(module.max_norm is None for module in modules if isinstance(module, nn.Embedding))
    )


def whole_experts(payloads: Iterable[Payload]) -> list[str]:
    """Name the modules whose packed experts are one group, and held compressed."""
    return [
        payload.group.modules[0]
        for payload in payloads
        if payload.lossy
        and payload.group.expert is None
        and payload.group.blocks[0].pieces[0].expert is not None
    ]


def codec_scratch_bytes(payloads: Iterable[Payload]) -> int:
    """Return the share of it in which compressed weights are expanded."""
    records = (part.record for payload in payloads for part in payload.parts)
    return kernels.scratch_bytes((each.rows, each.cols) for each in records if each is not None)


def lookup_bytes(payload: Payload) -> int:
    """Return the buffer that lookups in an embedding need while it is away."""
    if not payload.by_rows or Use.EMBEDDING not in payload.parts[0].uses:
        return 0
    part = payload.parts[0]
    if part.record is not None:
        return max(shard.num_bytes for shard in payload.shards)
    row_bytes = part.columns * part.dtype.itemsize
    return min((-(-row_bytes // CHUNK_BYTES) + 1) * CHUNK_BYTES, payload.num_bytes)


def lookup_moved(payload: Payload) -> int:
    """Return what the lookup of one row moves while the payload is away; 0: it isn't looked up."""
    if not (payload.by_rows and Use.EMBEDDING in payload.parts[0].uses):
        return 0
    return payload.shards[0].num_bytes if payload.parts[0].record is not None else CHUNK_BYTES
