"""The tiers that a request's keys and values may be held at, and the bytes that each takes.

The first ``SINK_TOKENS`` of a text, which attention returns to again and again (Xiao et al. 2023,
arXiv:2309.17453), and the latest ``RECENT_TOKENS`` at least are always full; what is between them
is compact, in pages of ``PAGE_TOKENS``. What isn't in pages lies in blocks of ``BLOCK_TOKENS``. No
torch: planning and admission compute with it.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import xxhash

from ..codecs.layout import Codec, RecordLayout
from ..errors import InputError
from ..precision.allocate import Option, allocate_precisions
from ..vocabulary import Precision

if TYPE_CHECKING:
    from ..signals.kv import KvLayer

SINK_TOKENS = 4
RECENT_TOKENS = 64
PAGE_TOKENS = 64
BLOCK_TOKENS = 16
FULL = "full"

LayerPrecisions = tuple[Precision, Precision]
"""Of a layer's keys, and of its values."""

UNIFORM: Mapping[str, LayerPrecisions] = {
    "K3V2": (Precision.INT3, Precision.INT2),
    "K4V4": (Precision.INT4, Precision.INT4),
    "K6V5": (Precision.INT6, Precision.INT5),
    "K8V8": (Precision.INT8, Precision.INT8),
}
"""The tiers below full, low to high, where all layers are alike."""


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
        full = _with_room(tokens - pages * PAGE_TOKENS)
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


def _with_room(tokens: int) -> int:
    """Return the full tokens that there is room for where so many are."""
    return SINK_TOKENS + -(-max(0, tokens - SINK_TOKENS) // BLOCK_TOKENS) * BLOCK_TOKENS


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """Tiers of one model's cache, low to high; a tier is named by its index.

    A higher tier takes more bytes than a lower one for every number of tokens that has a page, and
    the same for fewer: only pages differ, and a ladder whose pages don't grow can't be made
    (``make_ladder`` leaves out the tiers that would break it). Raises InputError for one.
    """

    shape: KvShape
    tiers: tuple[KvTier, ...]

    def __post_init__(self) -> None:
        if not self.tiers or any(
            (t.precisions is None) != (t is self.tiers[-1]) for t in self.tiers
        ):
            raise InputError(
                f"a ladder of {self.names}: the last tier has to be full, and no other"
            )
        if len(set(self.names)) < len(self.names):
            raise InputError(f"a ladder of {self.names} has a tier twice: keep one")
        for tier in self.tiers[:-1]:
            if len(tier.precisions or ()) != self.shape.layers:
                raise InputError(
                    f"tier {tier.name} has precisions for {len(tier.precisions or ())} layers, and "
                    f"the model has {self.shape.layers}: make it for this model"
                )
        for (low, less), (high, more) in pairwise(zip(self.names, self._page_bytes, strict=True)):
            if more <= less:
                raise InputError(
                    f"a page of tier {high} takes {more} bytes and one of {low}, below it, {less}: "
                    "leave one of them out"
                )

    @property
    def names(self) -> tuple[str, ...]:
        """The tiers' names."""
        return tuple(tier.name for tier in self.tiers)

    @property
    def full(self) -> int:
        """Index of the last tier."""
        return len(self.tiers) - 1

    @cached_property
    def _page_bytes(self) -> tuple[int, ...]:
        return tuple(tier.page_bytes(self.shape) for tier in self.tiers)

    def index(self, name: str) -> int:
        """Return the index of a tier; InputError for a name that isn't there."""
        if name not in self.names:
            raise InputError(f"there is no tier {name!r}: the ladder has {', '.join(self.names)}")
        return self.names.index(name)

    def restrict(self, names: str | Iterable[str]) -> "Ladder":
        """Return the ladder of some tiers, in this one's order; full is always there.

        ``names``: or one text, with spaces between them. Raises InputError for an unknown one.
        """
        wanted = {self.index(name) for name in (names.split() if isinstance(names, str) else names)}
        kept = sorted(wanted | {self.full})
        return replace(self, tiers=tuple(self.tiers[index] for index in kept))

    def num_bytes(self, tier: int, tokens: int) -> int:
        """Return the bytes of a text at rest, over all layers."""
        return self.tiers[tier].num_bytes(self.shape, tokens)

    def peak_bytes(self, tier: int, tokens: int, *, start: int = 0, window: int = 0) -> int:
        """Return the most that a text takes while it grows to so many tokens, from ``start`` on.

        Before a page is made of them, its tokens are full: bytes rise by tokens and fall by pages.
        ``window``: tokens that may stand full behind the text, such as drafted ones that no pass
        has checked yet. From the beginning on, neither more tokens nor a higher tier ever lowers
        it.
        """
        pages = num_pages(tokens)
        most = self._standing_bytes(tier, pages, tokens + window)
        last = SINK_TOKENS + RECENT_TOKENS + PAGE_TOKENS * pages
        if pages and last > start:  # a moment before the last page was made
            most = max(most, self._standing_bytes(tier, pages - 1, last + window))
        return most

    def _standing_bytes(self, tier: int, pages: int, tokens: int) -> int:
        """Return the bytes of so many pages, and the rest of the tokens in full."""
        full = _with_room(tokens - pages * PAGE_TOKENS)
        return pages * self._page_bytes[tier] + full * self.shape.token_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return all that says what the tiers hold, as JSON has it."""
        return {
            "sink_tokens": SINK_TOKENS,
            "recent_tokens": RECENT_TOKENS,
            "page_tokens": PAGE_TOKENS,
            "shape": asdict(self.shape),
            "tiers": [
                {"name": tier.name, "precisions": tier.precisions and [*map(list, tier.precisions)]}
                for tier in self.tiers
            ],
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "Ladder":
        """Make the ladder of a document; InputError for one that isn't a ladder of this release."""
        own = {
            "sink_tokens": SINK_TOKENS,
            "recent_tokens": RECENT_TOKENS,
            "page_tokens": PAGE_TOKENS,
        }
        try:
            other = {key: document[key] for key in own if document[key] != own[key]}
            tiers = tuple(
                KvTier(name=tier["name"], precisions=_parse_precisions(tier["precisions"]))
                for tier in document["tiers"]
            )
            shape = KvShape(**document["shape"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"not a ladder of tiers ({error!r}): make it anew") from error
        if other:
            raise InputError(f"the ladder is of pages with {other}, and here they have {own}")
        return cls(shape=shape, tiers=tiers)

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits that change with anything ``to_dict`` says."""
        return xxhash.xxh3_64_hexdigest(json.dumps(self.to_dict(), sort_keys=True).encode())


def make_ladder(shape: KvShape, *, damage: "Sequence[KvLayer] | None" = None) -> Ladder:
    """Return the tiers of ``UNIFORM`` and full; without those that wouldn't take fewer bytes than
    the next above them.

    ``damage``: of every layer, what keys and values cost at each precision
    (``collect_kv_fisher``, round trips named by precisions). Layers then differ in bits: of those
    within the uniform tier's bytes, the choice with the least predicted KL. Records of short rows
    are mostly scales and alignment: there a compact tier may be as large as full. Raises InputError
    for a damage of other layers, or without a precision that the tiers have.
    """
    tiers: list[KvTier] = [KvTier(name=FULL, precisions=None)]
    for name, pair in reversed(list(UNIFORM.items())):
        tier = KvTier(name=name, precisions=(pair,) * shape.layers)
        if damage is not None:
            tier = _spread_bits(tier, shape, damage)
        if tier.page_bytes(shape) < tiers[0].page_bytes(shape):
            tiers.insert(0, tier)
    return Ladder(shape=shape, tiers=tuple(tiers))


def _spread_bits(tier: KvTier, shape: KvShape, damage: "Sequence[KvLayer]") -> KvTier:
    """Return a tier of at most the same bytes with the least predicted KL."""
    if len(damage) != shape.layers:
        raise InputError(
            f"damage is known of {len(damage)} layers, and the model has {shape.layers}: measure "
            "it on this model"
        )
    needed = {precision for pair in UNIFORM.values() for precision in pair}
    for layer in damage:
        if missing := needed - layer.damage.keys():
            raise InputError(
                f"layer {layer.layer} has no damage of {', '.join(sorted(missing))}: measure it "
                "with a round trip of each precision"
            )
    lay_out = {"keys": (key_layout, shape.key_dim), "values": (value_layout, shape.value_dim)}
    size = {
        (side, precision): float(layout(precision, shape.heads, dim).num_bytes)
        for side, (layout, dim) in lay_out.items()
        for precision in needed
    }
    options = {
        f"{layer.layer} {side}": [
            Option(p, size[side, p], getattr(layer.damage[p], side)) for p in sorted(needed)
        ]
        for layer in damage
        for side in ("keys", "values")
    }
    chosen = allocate_precisions(options, cost_budget=tier.page_bytes(shape)).precisions
    pairs = ((chosen[f"{layer.layer} keys"], chosen[f"{layer.layer} values"]) for layer in damage)
    return replace(tier, precisions=tuple(pairs))


def _parse_precisions(given: Any) -> tuple[LayerPrecisions, ...] | None:
    if given is None:
        return None
    return tuple((Precision(keys), Precision(values)) for keys, values in given)
