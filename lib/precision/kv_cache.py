"""A compressed cache of keys and values for ``transformers``: records of a codec, layer by layer.

Tokens gather in a short tail as they come; ``RECORD_TOKENS`` of them become one record (``codecs``:
packed codes with a scale and a zero per head and token), which is never encoded again. Attention
reads everything as it comes back from the codec, the tail too, so a sequence gives the same logits
in whatever pieces it is fed. Memory is that of the records and the tail; an update decodes one
layer as a whole, so a token costs time in proportion to the length so far.

    model.generate(ids, past_key_values=make_cache([int4, (int8, int4), None]))
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ..errors import InputError
from .codecs import Codec, RecordLayout, decode, encode

RECORD_TOKENS = 64
"""Enough that a record's header and alignment are a few percent of it for one sequence."""

LayerCodecs = Codec | None | tuple[Codec | None, Codec | None]
"""One for keys and values, or one for each; None keeps them as they are."""


class EncodedStates:
    """One layer's keys, or its values, (B, heads, T, dim), growing along T."""

    def __init__(self, codec: Codec | None) -> None:
        self._codec = codec
        self._records: list[tuple[Tensor, RecordLayout, tuple[int, ...]]] = []
        self._tail: Tensor | None = None
        self.length = 0

    def append(self, states: Tensor) -> Tensor:
        """Store new states and return all so far, as the codec gives them back."""
        self.length += states.shape[-2]
        tail = states if self._tail is None else torch.cat([self._tail, states], dim=-2)
        if self._codec is None:
            self._tail = tail
            return tail
        whole = tail.shape[-2] // RECORD_TOKENS * RECORD_TOKENS
        if whole:
            self._records.append(_encode_states(tail[..., :whole, :], self._codec))
        self._tail = tail[..., whole:, :].clone()
        parts = [_decode_states(*stored, dtype=states.dtype) for stored in self._records]
        if self._tail.shape[-2]:
            parts.append(round_trip(self._tail, self._codec))
        return torch.cat(parts, dim=-2)

    @property
    def num_bytes(self) -> int:
        """Bytes of the records, headers included, and of the tail."""
        tail = 0 if self._tail is None else self._tail.nbytes
        return tail + sum(record.nbytes for record, *_ in self._records)


class EncodedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer of a cache: keys and values with a codec each."""

    def __init__(self, codecs: LayerCodecs) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._codecs = codecs if isinstance(codecs, tuple) else (codecs, codecs)
        self.reset()

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values."""
        return self._key_states.num_bytes + self._value_states.num_bytes

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is allocated before there is something to store."""
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values (B, heads, T, dim); return all so far."""
        self.lazy_initialization(key_states, value_states)
        return self._key_states.append(key_states), self._value_states.append(value_states)

    def get_seq_length(self) -> int:
        """Return the number of tokens stored."""
        return self._key_states.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of the keys that a query of this length sees."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: it grows without bound."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self._key_states, self._value_states = map(EncodedStates, self._codecs)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refuse beam search."""
        raise InputError("a compressed cache can't be reordered: generate with num_beams=1")


def make_cache(codecs: Sequence[LayerCodecs]) -> Cache:
    """Return an empty cache, with one entry of ``codecs`` per layer of the model."""
    return Cache(layers=[EncodedLayer(codec) for codec in codecs])


def cache_bytes(cache: Cache) -> int:
    """Return the bytes that a cache of ``make_cache`` holds."""
    return sum(layer.num_bytes for layer in cache.layers if isinstance(layer, EncodedLayer))


def round_trip(states: Tensor, codec: Codec) -> Tensor:
    """Return keys or values (B, heads, T, dim) as the cache gives them back."""
    return _decode_states(*_encode_states(states, codec), dtype=states.dtype)


def _encode_states(states: Tensor, codec: Codec) -> tuple[Tensor, RecordLayout, tuple[int, ...]]:
    rows = states.detach().reshape(-1, states.shape[-1])
    record = encode(rows, codec).to(states.device)
    return record, codec.layout(*rows.shape), tuple(states.shape)


def _decode_states(
    record: Tensor, layout: RecordLayout, shape: tuple[int, ...], *, dtype: torch.dtype
) -> Tensor:
    return decode(record, layout, dtype=dtype).view(shape)
