"""What lies in the stores: payloads written once, read whole, in shards, or by rows."""

import contextlib
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from ...errors import PlacementError
from ...vocabulary import Tier
from ..payload.contents import (
    Piece,
    content_key,
    flat_bytes,
    part_view,
    payload_bytes,
    payload_pieces,
)
from ..payload.known import KnownWeights
from ..payload.layout import Payload, Shard
from ..payload.parts import Part
from ..stores import CHUNK_BYTES, DeviceStore, KeptRecords, Store, aligned_buffer
from .originals import Originals

_PIECE_BYTES = 4 * CHUNK_BYTES
"""What is read at a time where weights get memory of their own."""

Stored = tuple[Tier, str]
"""Tier and key of a payload."""


class Archive:
    """Payloads of one model in the stores of the tiers. ``records``: the compressed ones are kept
    there, too, and made once. ``known``: what some are coded by.
    """

    def __init__(
        self,
        stores: Mapping[Tier, Store],
        originals: Originals,
        records: KeptRecords | None = None,
        known: KnownWeights | None = None,
        *,
        lasting: bool,
    ) -> None:
        self.lasting = lasting
        """The SSD tier is kept for the next run."""
        self._stores = stores
        self._originals = originals
        self._records = records
        self._known = known
        self._kept: set[Stored] = set()

    def put(self, payload: Payload, tier: Tier, before: Stored | None = None) -> Stored:
        """Store a payload in a tier, unless it is there: from another tier, or from the originals.

        Its key is its content, so that what an earlier run stored serves again.
        """
        store = self._stores[tier]
        if before is not None:
            key = before[1]
            parts: Iterator[Tensor] = (buffer for buffer, _ in self.shards(before, payload))
        else:
            key = self.key(payload)
            parts = self._make(payload, key)
        store.put(key, payload.num_bytes, parts)
        self._kept.add((tier, key))
        return tier, key

    def has(self, payload: Payload, tier: Tier) -> bool:
        """Say whether a payload is there already, as the originals are now."""
        return self._stores[tier].has(self.key(payload))

    def is_kept(self, payload: Payload) -> bool:
        """Say whether a payload needn't be made from the originals as they are now."""
        if self._records is None or not payload.lossy:
            return False
        return self._records.has(self.key(payload))

    def pieces(self, payload: Payload, stays: Callable[[Part], bool]) -> Generator[Piece]:
        """Yield what goes into a payload that isn't stored, kept or from the originals; to be
        closed. ``stays``: whether the caller computes with a part's record itself, for good.
        """
        if self._records is None or not payload.lossy:
            yield from payload_pieces(payload, self._originals.read)
            return
        key = self.key(payload)
        if self._records.has(key):
            try:
                for shard in payload.shards:
                    yield from _pieces_of(self._read_kept(key, shard), payload, shard)
                return
            except PlacementError as error:
                warnings.warn(f"{error}; they are made anew", stacklevel=2)
        places = [each.offset for each in (payload.shards if payload.by_rows else payload.parts)]
        with self._records.adding(key, payload.num_bytes) as add:
            pieces = payload_pieces(payload, self._originals.read)
            for place, piece in zip(places, pieces, strict=True):
                part, _, data, record = piece
                add(place, flat_bytes(data), record == part.record and stays(part))
                yield piece

    def key(self, payload: Payload) -> str:
        """Return the key of a payload that is made from the originals as they are now."""
        expert = payload.group.slice
        names = [part.parameter for part in payload.parts]
        identities = {name: self._originals.identity(name, expert) for name in names}
        key = content_key(payload, identities)
        return key if self._known is None else self._known.key(key, payload)

    @contextlib.contextmanager
    def reading_ahead(self, names: Iterable[str]) -> Iterator[None]:
        """Read originals ahead, in the order in which they will be needed. The disk is theirs: what
        is kept meanwhile gets there afterwards.
        """
        later = contextlib.nullcontext() if self._records is None else self._records.later()
        with later, self._originals.reading_ahead(names):
            yield

    def finish(self) -> None:
        """Wait until what is kept of records is in its files."""
        if self._records is not None:
            self._records.finish()

    def keep_only(self, wanted: set[Stored]) -> None:
        """Free the payloads that nothing refers to any more."""
        for tier, key in self._kept - wanted:
            self._stores[tier].free(key)
        self._kept &= wanted

    def view(self, stored: Stored) -> Tensor | None:
        """Return a payload where it lies; None where that is no memory."""
        return self._stores[stored[0]].view(stored[1])

    def shards(self, stored: Stored, payload: Payload) -> Iterator[tuple[Tensor, Shard]]:
        """Read a payload shard by shard."""
        for shard in payload.shards:
            yield self.read_shard(stored, shard), shard

    def weights(
        self, stored: Stored, payload: Payload, device_of: Callable[[str], torch.device]
    ) -> Iterator[tuple[Part, Tensor]]:
        """Read a payload: raw parts as tensors of their own on a device, others as records."""
        if payload.by_rows:
            part = payload.parts[0]
            whole = torch.empty(part.shape, dtype=part.dtype, device=device_of(part.parameter))
            for buffer, shard in self.shards(stored, payload):
                data = buffer[: shard.data_bytes].view(part.dtype)
                whole[shard.start : shard.end] = data.view(-1, part.columns)
            yield part, whole
            return
        for buffer, _ in self.shards(stored, payload):
            for part in payload.parts:
                if part.record is None:
                    view = part_view(buffer, part)
                    weights = torch.empty_like(view, device=device_of(part.parameter))
                    yield part, weights.copy_(view)
                else:
                    yield part, buffer[part.offset : part.offset + part.num_bytes]

    def original(
        self, stored: Stored, payload: Payload, name: str, start: int | None, end: int | None
    ) -> Tensor:
        """Read a raw payload's parameter, or rows [start, end) of it, to host memory; read-only."""
        part = next(part for part in payload.parts if part.parameter == name)
        if start is not None and not part.is_contiguous:
            return self.original(stored, payload, name, None, None)[start:end]
        if payload.by_rows:
            rows = []
            for shard in payload.shards:
                low, high = max(start or 0, shard.start), shard.end
                high = high if end is None else min(end, high)
                if low < high:
                    data = self.read_shard(stored, shard)[: shard.data_bytes].view(part.dtype)
                    rows.append(data.view(-1, part.columns)[low - shard.start : high - shard.start])
            return (rows[0] if len(rows) == 1 else torch.cat(rows)).cpu()
        row_bytes = part.num_bytes // max(part.shape[0], 1) if part.shape else part.num_bytes
        low = part.offset + (start or 0) * row_bytes
        high = part.offset + (part.num_bytes if end is None else end * row_bytes)
        flat = torch.empty((high - low) // part.dtype.itemsize, dtype=part.dtype)
        self._copy_bytes(stored, payload, low, flat.view(torch.uint8))
        if start is None:
            return flat.as_strided(part.shape, part.stride, flat.storage_offset())
        return flat.view(-1, *part.shape[1:])

    def copy(self, stored: Stored, payload: Payload, part: Part, device: torch.device) -> Tensor:
        """Read a raw part into memory of its own, of exactly its bytes; takes 1 MiB besides."""
        weights = torch.empty_strided(part.shape, part.stride, dtype=part.dtype, device=device)
        target = weights.as_strided((weights.numel(),), (1,)).view(torch.uint8)
        if not payload.by_rows:
            self._copy_bytes(stored, payload, part.offset, target)
        for shard in payload.shards if payload.by_rows else ():
            start = shard.start * part.columns * part.dtype.itemsize
            rows = target[start : start + shard.data_bytes]
            self._copy_bytes(stored, payload, shard.offset, rows)
        return weights

    def _copy_bytes(self, stored: Stored, payload: Payload, start: int, target: Tensor) -> None:
        """Fill a tensor with a payload's bytes from ``start`` on, a piece at a time."""
        end = start + len(target)
        if (view := self.view(stored)) is not None:
            target.copy_(view[start:end])
            return
        buffer = aligned_buffer(_PIECE_BYTES)
        # Whole chunks, since these are what has a checksum.
        for first in range(start // CHUNK_BYTES * CHUNK_BYTES, end, _PIECE_BYTES):
            chunks_end = min(-(-end // CHUNK_BYTES) * CHUNK_BYTES, payload.num_bytes)
            piece = buffer[: min(_PIECE_BYTES, chunks_end - first)]
            self._stores[stored[0]].read_into(stored[1], first, piece)
            low, high = max(start, first), min(end, first + len(piece))
            target[low - start : high - start] = piece[low - first : high - first]

    def raw_rows(
        self, stored: Stored, part: Part, shard: Shard, ids: Tensor, buffer: Tensor
    ) -> tuple[Tensor, int]:
        """Read rows (n, columns) of a raw shard; ids are sorted. Returns the bytes moved, too."""
        row_bytes = part.columns * part.dtype.itemsize
        if (view := self.view(stored)) is not None:
            data = view[shard.offset : shard.offset + shard.data_bytes].view(part.dtype)
            return data.view(-1, part.columns)[ids.to(data.device)], len(ids) * row_bytes
        rows = torch.empty(len(ids), part.columns, dtype=part.dtype)
        target = rows.view(torch.uint8)
        moved_bytes, low, high = 0, 0, 0
        for place, row in enumerate(ids.tolist()):
            start = shard.offset + row * row_bytes
            if not low <= start < start + row_bytes <= high:
                # Whole chunks, since these are what has a checksum; the next rows may be there,
                # too.
                low = start // CHUNK_BYTES * CHUNK_BYTES
                end = -(-(start + row_bytes) // CHUNK_BYTES) * CHUNK_BYTES
                high = min(end, shard.offset + shard.num_bytes)
                self._stores[stored[0]].read_into(stored[1], low, buffer[: high - low])
                moved_bytes += high - low
            target[place] = buffer[start - low : start - low + row_bytes]
        return rows, moved_bytes

    def raw_range(
        self, stored: Stored, part: Part, shard: Shard, rows: tuple[int, int], buffer: Tensor
    ) -> Tensor:
        """Read the bytes of rows [start, end) of a raw shard, into ``buffer`` where they aren't in
        memory: it holds the chunks that they lie in.
        """
        row_bytes = part.columns * part.dtype.itemsize
        start, end = (shard.offset + row * row_bytes for row in rows)
        if (view := self.view(stored)) is not None:
            return view[start:end]
        low = start // CHUNK_BYTES * CHUNK_BYTES  # whole chunks have a checksum
        high = min(-(-end // CHUNK_BYTES) * CHUNK_BYTES, shard.offset + shard.num_bytes)
        self._stores[stored[0]].read_into(stored[1], low, buffer[: high - low])
        return buffer[start - low : end - low]

    def read_shard(self, stored: Stored, shard: Shard) -> Tensor:
        """Return one shard, in memory of its own where it isn't in memory."""
        if (view := self.view(stored)) is not None:
            return view[shard.offset : shard.offset + shard.num_bytes]
        buffer = aligned_buffer(shard.num_bytes)
        self._stores[stored[0]].read_into(stored[1], shard.offset, buffer)
        return buffer

    def shard_record(self, stored: Stored, shard: Shard, buffer: Tensor) -> Tensor:
        """Read a shard's record, into ``buffer`` where it isn't in memory."""
        if (view := self.view(stored)) is not None:
            return view[shard.offset : shard.offset + shard.data_bytes]
        self._stores[stored[0]].read_into(stored[1], shard.offset, buffer[: shard.num_bytes])
        return buffer[: shard.data_bytes]

    def _make(self, payload: Payload, key: str) -> Iterator[Tensor]:
        """Return the bytes of a payload that isn't stored, kept or from the originals."""
        if self._keep(payload, key):
            return (self._read_kept(key, shard) for shard in payload.shards)
        return payload_bytes(payload, self._originals.read)

    def _keep(self, payload: Payload, key: str) -> bool:
        """See to it that a compressed payload is kept; returns whether it is."""
        if self._records is None or not payload.lossy:
            return False
        return self._records.keep(
            key, payload.num_bytes, lambda: payload_bytes(payload, self._originals.read)
        )

    def _read_kept(self, key: str, shard: Shard) -> Tensor:
        assert self._records is not None
        buffer = aligned_buffer(shard.num_bytes)
        self._records.read_into(key, shard.offset, buffer)
        return buffer

    def memory_bytes(self) -> int:
        """Measure the payloads that lie in memory."""
        return sum(
            store.used_bytes() for store in self._stores.values() if isinstance(store, DeviceStore)
        )

    def close(self) -> None:
        """Close the stores."""
        for store in self._stores.values():
            store.close()
        if self._records is not None:
            self._records.close()


def _pieces_of(buffer: Tensor, payload: Payload, shard: Shard) -> Iterator[Piece]:
    """Yield the pieces of a shard; raw weights in memory of their own."""
    if payload.by_rows:
        yield payload.parts[0], shard.start, buffer[: shard.data_bytes], shard.record
        return
    for part in payload.parts:
        if part.record is None:
            view = part_view(buffer, part)
            yield part, 0, torch.empty_like(view).copy_(view), None
        else:
            yield part, 0, buffer[part.offset : part.offset + part.num_bytes], part.record
