"""A compressed cache of keys and values for ``transformers``: records of a codec, layer by layer.

Tokens gather in a short tail as they come; ``RECORD_TOKENS`` of them become one record (``codecs``:
packed codes with a scale and a zero per head and token), which is never encoded again. Attention
reads everything as it comes back from the codec, the tail too, so a sequence gives the same logits
in whatever pieces it is fed. Memory is that of the records and the tail; an update decodes one
layer as a whole, so a token costs time in proportion to the length so far. Tokens are taken away,
and sequences selected or repeated, by copying rows of the records: what stays decodes as before.

    model.generate(ids, past_key_values=make_cache([int4, (int8, int4), None]))
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ..codecs.records import Codec, RecordLayout, decode, encode, section_views
from ..errors import InputError

RECORD_TOKENS = 64
"""Enough that a record's header and alignment are a few percent of it for one sequence."""

LayerCodecs = Codec | None | tuple[Codec | None, Codec | None]
"""One for keys and values, or one for each; None keeps them as they are."""


@dataclass(frozen=True, slots=True)
class _Record:
    """Encoded states of some tokens; one row per sequence, head and token. Its header is unused."""

    data: Tensor
    layout: RecordLayout
    shape: tuple[int, ...]
    """(B, heads, T, dim)."""

    @classmethod
    def encode(cls, states: Tensor, codec: Codec) -> "_Record":
        rows = states.detach().reshape(-1, states.shape[-1])
        record = encode(rows, codec).to(states.device)
        return cls(record, codec.layout(*rows.shape), tuple(states.shape))

    def decode(self, dtype: torch.dtype) -> Tensor:
        return decode(self.data, self.layout, dtype=dtype).view(self.shape)

    def select(self, *, sequences: Tensor | None = None, tokens: int | None = None) -> "_Record":
        """Copy sequences (indices into the batch), or the first tokens, into a new record."""
        rows = torch.arange(self.layout.rows, device=self.data.device).view(self.shape[:-1])
        rows = rows[..., :tokens] if sequences is None else rows[sequences]
        layout = self.layout.codec.layout(rows.numel(), self.layout.cols)
        data = self.data.new_zeros(layout.num_bytes)
        pairs = zip(section_views(self.data, self.layout), section_views(data, layout), strict=True)
        for old, new in pairs:
            torch.index_select(old, 0, rows.flatten(), out=new)
        return _Record(data, layout, (*rows.shape, self.shape[-1]))


class EncodedStates:
    """One layer's keys, or its values, (B, heads, T, dim), growing along T."""

    def __init__(self, codec: Codec | None) -> None:
        self._codec = codec
        self._records: list[_Record] = []
        self._tail: Tensor | None = None
        self.length = 0

    def append(self, states: Tensor) -> Tensor:
        """Store new states and return all so far, as the codec gives them back."""
        tail = states if self._tail is None else torch.cat([self._tail, states], dim=-2)
        if self._codec is None:
            self._tail = tail
            self.length += states.shape[-2]
            return tail
        whole = tail.shape[-2] // RECORD_TOKENS * RECORD_TOKENS
        if whole:
            self._records.append(_Record.encode(tail[..., :whole, :], self._codec))
        self._tail = tail[..., whole:, :].clone()
        self.length += states.shape[-2]
        parts = [record.decode(states.dtype) for record in self._records]
        if self._tail.shape[-2]:
            parts.append(round_trip(self._tail, self._codec))
        return torch.cat(parts, dim=-2) if parts else states

    def crop(self, num_tokens: int) -> None:
        """Take away the last tokens, all of them if there are fewer."""
        kept = self.length = max(0, self.length - num_tokens)
        if not kept:
            self._records, self._tail = [], None
            return
        records = []
        for record in self._records:
            tokens = min(kept, record.shape[-2])
            if tokens:
                records.append(
                    record if tokens == record.shape[-2] else record.select(tokens=tokens)
                )
            kept -= tokens
        self._records = records
        if self._tail is not None:
            self._tail = self._tail[..., :kept, :].clone()

    def select(self, sequences: Tensor) -> None:
        """Keep the sequences of these indices into the batch, in their order."""
        self._records = [record.select(sequences=sequences) for record in self._records]
        if self._tail is not None:
            self._tail = self._tail[sequences]

    @property
    def num_sequences(self) -> int:
        """Sequences of the batch; 0 before there are any."""
        shapes = [record.shape for record in self._records[:1]]
        shapes += [] if self._tail is None else [tuple(self._tail.shape)]
        return shapes[0][0] if shapes else 0

    @property
    def device(self) -> torch.device | None:
        """Where the states are; None before there are any."""
        tensors = [record.data for record in self._records[:1]]
        tensors += [] if self._tail is None else [self._tail]
        return tensors[0].device if tensors else None

    @property
    def num_bytes(self) -> int:
        """Bytes of the records, headers included, and of the tail."""
        tail = 0 if self._tail is None else self._tail.nbytes
        return tail + sum(record.data.nbytes for record in self._records)


class EncodedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer of a cache: keys and values with a codec each."""

    is_sliding = False
    is_croppable = True

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
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Take away tokens from the end: so many as the number, 0 or negative, says."""
        tokens_to_remove = int(tokens_to_remove)  # generate() of transformers 5.17 gives a tensor
        if tokens_to_remove > 0:
            raise InputError(
                f"crop({tokens_to_remove}): give the number of tokens to take away as a negative "
                "number, or 0"
            )
        if tokens_to_remove:
            self._key_states.crop(-tokens_to_remove)
            self._value_states.crop(-tokens_to_remove)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences that indices, or a mask, name."""
        if self.get_seq_length():
            sequences = self._sequences()[indices]
            self._key_states.select(sequences)
            self._value_states.select(sequences)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence, copies side by side."""
        if self.get_seq_length():
            self.batch_select_indices(self._sequences().repeat_interleave(repeats))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refuse beam search, which would copy every record at every token."""
        raise InputError("a compressed cache can't be reordered: generate with num_beams=1")

    def _sequences(self) -> Tensor:
        return torch.arange(self._key_states.num_sequences, device=self._key_states.device)


class EncodedCache(Cache):
    """A cache with a codec for each layer of a model."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values; return all so far.

        InputError for a layer without a codec, and for states that its codec can't store.
        """
        if layer_idx >= len(self.layers):
            raise InputError(
                f"layer {layer_idx} of the model has no codec: make_cache was given "
                f"{len(self.layers)}, and each layer needs one (config.num_hidden_layers)"
            )
        try:
            updated: tuple[Tensor, Tensor] = super().update(
                key_states, value_states, layer_idx, *args, **kwargs
            )
        except InputError as error:
            raise InputError(f"keys or values of layer {layer_idx}: {error}") from error
        return updated


def make_cache(codecs: Sequence[LayerCodecs]) -> EncodedCache:
    """Return an empty cache, with one entry of ``codecs`` per layer of the model."""
    return EncodedCache(layers=[EncodedLayer(codec) for codec in codecs])


def cache_bytes(cache: Cache) -> int:
    """Return the bytes that a cache of ``make_cache`` holds."""
    return sum(layer.num_bytes for layer in cache.layers if isinstance(layer, EncodedLayer))


def round_trip(states: Tensor, codec: Codec) -> Tensor:
    """Return keys or values (B, heads, T, dim) as the cache gives them back."""
    return _Record.encode(states, codec).decode(states.dtype)
