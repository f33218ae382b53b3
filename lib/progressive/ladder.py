"""The tiers that a request's keys and values may be held at, and the bytes that each takes.

The first ``SINK_TOKENS`` of a text, which attention returns to again and again (Xiao et al. 2023,
arXiv:2309.17453), and the latest ``RECENT_TOKENS`` at least are always full; what is between them
is compact, in pages of ``PAGE_TOKENS``. What isn't in pages lies in blocks of ``BLOCK_TOKENS``. No
torch: planning and admission compute with it.
"""

from dataclasses import dataclass

from ..codecs.layout import Codec, RecordLayout
from ..vocabulary import Precision

SINK_TOKENS = 4
RECENT_TOKENS = 64
PAGE_TOKENS = 64
BLOCK_TOKENS = 16

LayerPrecisions = tuple[Precision, Precision]
"""Of a layer's keys, and of its values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvShape:
    """What a token leaves in the cache of a model."""

    layers: int
    heads: int
    """Of keys and values, not of queries."""
    key_dim: int
    value_dim: int
    itemsize: int
    """Bytes of a number of the model's dtype."""

    @property
    def token_bytes(self) -> int:
        """Bytes of a token in full, over all layers."""
        return self.layers * self.heads * (self.key_dim + self.value_dim) * self.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class KvTier:
    """One tier: what pages hold."""

    name: str
    precisions: tuple[LayerPrecisions, ...] | None
    """One for each layer; None: pages are full."""

    def page_bytes(self, shape: KvShape) -> int:
        """Return the bytes of one page, over all layers."""
        if self.precisions is None:
            return PAGE_TOKENS * shape.token_bytes
        return sum(
            key_layout(keys, shape.heads, shape.key_dim).num_bytes
            + value_layout(values, shape.heads, shape.value_dim).num_bytes
            for keys, values in self.precisions
        )

    def num_bytes(self, shape: KvShape, tokens: int) -> int:
        """Return the bytes of a text of so many tokens, over all layers: those of its sinks, whole
        pages and whole blocks.
        """
        pages = num_pages(tokens)
        tail = max(0, tokens - SINK_TOKENS - pages * PAGE_TOKENS)
        full = SINK_TOKENS + -(-tail // BLOCK_TOKENS) * BLOCK_TOKENS
        return pages * self.page_bytes(shape) + full * shape.token_bytes


def key_layout(precision: Precision, heads: int, dim: int) -> RecordLayout:
    """Lay out a page of a layer's keys: a row, hence a scale and a zero, for each of a head's
    numbers, since some are far larger than others in all tokens (Liu et al. 2024, KIVI,
    arXiv:2402.02750). What isn't codes has a row for each head and token.
    """
    codec = Codec(precision)
    return (
        value_layout(precision, heads, dim)
        if codec.is_raw
        else codec.layout(heads * dim, PAGE_TOKENS)
    )


def value_layout(precision: Precision, heads: int, dim: int) -> RecordLayout:
    """Lay out a page of a layer's values: a row for each head and token."""
    return Codec(precision).layout(heads * PAGE_TOKENS, dim)


def num_pages(tokens: int) -> int:
    """Return the whole pages of a text: what is behind its first tokens and before its latest."""
    return max(0, (tokens - SINK_TOKENS - RECENT_TOKENS) // PAGE_TOKENS)
