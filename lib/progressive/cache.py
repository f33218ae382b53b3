"""A cache of keys and values whose last tokens can be taken away again, exactly.

Each layer has room for so many tokens, so that whatever computes with it has the same shapes from
the first token to the last, and a compiled graph fits. A token keeps its place for good: each
sequence of a batch has a length of its own, and what lies beyond is masked out. Layers with a
sliding window keep all tokens as well; ``Masks`` makes their window.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ..errors import InputError

SMALLEST = 256
"""Tokens that a cache has room for at least."""
_FULL, _SLIDING, _CHUNKED = "full_attention", "sliding_attention", "chunked_attention"


class CroppableLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer: keys and values (B, heads, room, dim), of which each sequence's ``lengths`` count.

    Shapes and memory stay the same from its first token on.
    """

    is_compileable = True
    is_croppable = True
    is_sliding = False
    keys: Tensor
    values: Tensor
    lengths: Tensor
    """Tokens of each sequence, int64, (B,)."""

    def __init__(self, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.room = room

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for states such as these, (B, heads, T, dim)."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            states.new_zeros((*states.shape[:2], self.room, states.shape[3]))
            for states in (key_states, value_states)
        )
        self.lengths = torch.zeros(len(key_states), dtype=torch.long, device=self.device)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values (B, heads, T, dim) behind each sequence's own; return all that
        there is room for.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = key_states.shape[2]
        places_BT = self.lengths[:, None] + torch.arange(tokens, device=self.device)
        for held, states in ((self.keys, key_states), (self.values, value_states)):
            held.scatter_(2, places_BT[:, None, :, None].expand_as(states), states)
        self.lengths.add_(tokens)
        return self.keys, self.values

    def get_seq_length(self) -> int | Tensor:  # type: ignore[override]
        """Return the tokens of the longest sequence, as a scalar tensor once there are any."""
        return self.lengths.amax() if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of the keys that a query of this length sees."""
        return self.room, 0

    def get_max_length(self) -> int:
        """Return the tokens that there is room for."""
        return self.room

    def reset(self) -> None:
        """Forget all tokens."""
        if self.is_initialized:
            self.lengths.zero_()

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Take away tokens from the end: so many as the number, 0 or negative, says, or one number
        for each sequence, (B,).
        """
        if not self.is_initialized:
            return
        left = self.lengths + tokens_to_remove
        if bool((left < 0).any()) or bool((left > self.lengths).any()):
            raise InputError(
                f"crop({tokens_to_remove}) of {self.lengths.tolist()} tokens: give the number of "
                "tokens to take away as a negative number, or 0"
            )
        self.lengths.copy_(left)

    def copy_of(self, other: "CroppableLayer") -> None:
        """Hold what another layer holds, in memory of its own."""
        self.dtype, self.device = other.dtype, other.device
        self.keys, self.values = other.keys.clone(), other.values.clone()
        self.lengths = other.lengths.clone()
        self.is_initialized = True

    def copy_tokens(self, other: "CroppableLayer", places_BT: Tensor) -> None:
        """Take the keys and values at some places of each sequence from another layer."""
        for held, source in ((self.keys, other.keys), (self.values, other.values)):
            places = places_BT[:, None, :, None].expand(-1, held.shape[1], -1, held.shape[3])
            held.scatter_(2, places, source.gather(2, places))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence, copies side by side."""
        if self.is_initialized:
            self._choose(torch.arange(len(self.keys)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences that indices, or a mask, name."""
        if self.is_initialized:
            self._choose(torch.arange(len(self.keys))[indices.cpu()])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let the sequences be those of these indices."""
        self.batch_select_indices(beam_idx)

    def _choose(self, sequences: Tensor) -> None:
        sequences = sequences.to(self.device)
        self.keys, self.values = self.keys[sequences], self.values[sequences]
        self.lengths = self.lengths[sequences]


class CroppableCache(Cache):
    """A cache of such layers."""

    def __init__(self, num_layers: int, num_tokens: int) -> None:
        """Have room for at least so many tokens: a power of two, or one and a half times such, so
        that there are few shapes, and few graphs to compile.
        """
        self.room = SMALLEST
        while self.room < num_tokens:
            self.room += self.room // (2 if self.room.bit_count() == 1 else 3)
        self._own = [CroppableLayer(self.room) for _ in range(num_layers)]
        super().__init__(layers=list(self._own))

    @property
    def lengths(self) -> Tensor:
        """The tokens of each sequence, int64, (B,)."""
        return self._own[0].lengths

    def copy(self) -> "CroppableCache":
        """Return another one that holds the same."""
        made = CroppableCache(len(self._own), self.room)
        for layer, own in made._beside(self):
            layer.copy_of(own)
        return made

    def copy_tokens(self, other: "CroppableCache", starts_B: Tensor, count: int) -> None:
        """Take so many tokens of each sequence, from a place on, from another cache."""
        places_BT = starts_B[:, None] + torch.arange(count, device=starts_B.device)
        for layer, source in self._beside(other):
            layer.copy_tokens(source, places_BT)

    def end_with(self, other: "CroppableCache", which_B: Tensor) -> None:
        """Have the lengths of another cache for some sequences."""
        for layer, source in self._beside(other):
            layer.lengths.copy_(torch.where(which_B, source.lengths, layer.lengths))

    def take_back(self, counts: int | Tensor) -> None:
        """Take away so many tokens from the end of all sequences, or of each (B,)."""
        for layer in self._own:
            layer.crop(-counts)

    def _beside(self, other: "CroppableCache") -> Iterator[tuple[CroppableLayer, CroppableLayer]]:
        """Yield each layer with another cache's; not those without tokens, which look at the keys
        and values of a layer before them.
        """
        for layer, source in zip(self._own, other._own, strict=True):
            if source.is_initialized:
                yield layer, source


class Masks:
    """What each token of a batch attends to in a ``CroppableCache``: the tokens of its sequence up
    to itself, those of its layer's window. ``starts``: where each sequence begins, after padding.

    Raises InputError for a kind of attention that isn't known here.
    """

    def __init__(self, config: Any, room: int, starts: Sequence[int], device: torch.device) -> None:
        config = config.get_text_config(decoder=True)
        self._implementation = config._attn_implementation
        if self._implementation not in ("sdpa", "eager"):
            raise InputError(
                f"exact output has no masks for attn_implementation {self._implementation!r}: load "
                "the model with 'sdpa' or 'eager'"
            )
        window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None) or [_FULL if window is None else _SLIDING]
        chunk = getattr(config, "attention_chunk_size", None)
        self._sizes: dict[str, int] = {_FULL: 0, _SLIDING: window or 0, _CHUNKED: chunk or 0}
        unknown = sorted(set(kinds) - self._sizes.keys())
        if unknown:
            raise InputError(
                f"a {config.model_type} has layers of {', '.join(unknown)}, whose state can't be "
                "taken back: attach without exact"
            )
        self._kinds = sorted(set(kinds))
        self._starts_B11 = torch.tensor(starts, device=device)[:, None, None]
        self._keys_K = torch.arange(room, device=device)

    def make(self, lengths_B: Tensor, tokens: int, dtype: torch.dtype) -> Any:
        """Return the mask of ``tokens`` new tokens behind so many of each sequence: (B, 1, T,
        room), or one for each kind of layer where a model has several.
        """
        queries_BT = lengths_B[:, None] + torch.arange(tokens, device=lengths_B.device)
        made = {kind: self._make(kind, queries_BT[..., None], dtype) for kind in self._kinds}
        return made if len(made) > 1 else made[self._kinds[0]]

    def _make(self, kind: str, queries_BT1: Tensor, dtype: torch.dtype) -> Tensor:
        keys_K, size = self._keys_K, self._sizes[kind]
        seen = (keys_K <= queries_BT1) & (keys_K >= self._starts_B11)
        if kind == _SLIDING:
            seen &= keys_K > queries_BT1 - size
        elif kind == _CHUNKED:
            first = self._starts_B11
            seen &= (keys_K - first) // size == (queries_BT1 - first) // size
        # Padding attends to itself: a row of nothing but masked keys has no softmax.
        seen |= keys_K == queries_BT1
        seen_B1TK = seen[:, None]
        if self._implementation == "sdpa":
            return seen_B1TK
        lowest = torch.finfo(dtype).min
        return torch.zeros(seen_B1TK.shape, dtype=dtype, device=seen.device).masked_fill_(
            ~seen_B1TK, lowest
        )
