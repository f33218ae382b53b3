"""How a page holds a layer's keys, or its values: a record of ``codecs``, or full."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...codecs import ops
from ...codecs.layout import PLANE_BITS, RecordLayout
from ...codecs.records import decode, encode
from ...errors import InputError
from ...vocabulary import Precision, precision_rank
from ..ladder import (
    PAGE_TOKENS,
    KvShape,
    KvTier,
    key_layout,
    value_layout,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PageFormat:
    """A page of states (heads, PAGE_TOKENS, dim): the tensor itself, or a record.

    A record of values has a row for each head and token, one of keys a row for each head and number
    of it, with the codes of all tokens (``ladder.key_layout``).
    """

    heads: int
    dim: int
    dtype: torch.dtype
    """Of the states."""
    are_keys: bool
    layout: RecordLayout | None = None
    """None: full. A prefix where planes were dropped: new pages drop them too."""

    def at(self, precision: Precision | None) -> "PageFormat":
        """Return the format at a precision; None: full."""
        lay_out = key_layout if self.are_keys else value_layout
        return replace(
            self, layout=None if precision is None else lay_out(precision, self.heads, self.dim)
        )

    @property
    def precision(self) -> Precision | None:
        """What is read of a page; None: full."""
        return None if self.layout is None else self.layout.precision

    @property
    def bits(self) -> tuple[int, int]:
        """Of a number, as stored and as read: the kernel's words for a format."""
        if self.layout is None:
            return self.dtype.itemsize * 8, self.dtype.itemsize * 8
        return self.layout.codec.bits, self.layout.bits

    @property
    def fits_kernel(self) -> bool:
        """Whether the kernel computes with such pages."""
        full = self.dtype in (torch.float32, torch.bfloat16)
        return full and self.dim % 16 == 0 and self.precision != Precision.FP16

    def address(self, page: Tensor) -> int:
        """Return where the kernel finds a page: full numbers, or a record of codes."""
        if self.layout is None or not self.layout.codec.is_raw:
            return page.data_ptr()
        return page.data_ptr() + self.layout.planes[0].offset

    def encode(self, states: Tensor) -> tuple[list[Tensor], list[float]]:
        """Return pages of states (pages, heads, PAGE_TOKENS, dim), in new memory, and of each the
        sum of its squared errors.
        """
        if self.layout is None:
            pages = [page.clone(memory_format=torch.contiguous_format) for page in states]
            return pages, [0.0] * len(pages)
        record, whole, errors = self._encode(states)
        pages = []
        for start in range(0, whole.rows, self.layout.rows):
            page = record.new_zeros(self.layout.num_bytes)
            for here, there, size in whole.row_ranges(start, start + self.layout.rows):
                page[there : there + size] = record[here : here + size]
            pages.append(page)
        return pages, errors

    def decode(self, page: Tensor) -> Tensor:
        """Return the states of a page: (heads, PAGE_TOKENS, dim)."""
        if self.layout is None:
            return page
        rows = _decode(page, self.layout, self.dtype)
        if self._by_number:
            return rows.view(self.heads, self.dim, PAGE_TOKENS).transpose(1, 2)
        return rows.view(self.heads, PAGE_TOKENS, self.dim)

    def lowered(self, precision: Precision | None) -> "PageFormat":
        """Return the format of fewer bits that drops planes of this one, or else another record's.

        Raises InputError for a more precise one, which pages can't be made of.
        """
        if precision == self.precision:
            return self
        if precision is None or (
            self.precision and precision_rank(precision) < precision_rank(self.precision)
        ):
            raise InputError(
                f"pages at {self.precision} can't be raised to {precision or 'full'}: rebuild them "
                "from the originals"
            )
        if self.layout is not None:
            own = PLANE_BITS.get(self.layout.codec.precision, ())
            bits = PLANE_BITS.get(precision, (0,))
            if bits == own[: len(bits)]:
                return replace(self, layout=self.layout.prefix(precision))
        return self.at(precision)

    def lower(self, page: Tensor, lowered: "PageFormat") -> Tensor:
        """Return a page of this format in another that ``lowered`` has returned."""
        own, other = self.layout, lowered.layout
        if own is not None and other is not None and own.codec == other.codec:
            return page[: other.num_bytes].clone()
        (page,), _ = lowered.encode(self.decode(page)[None])
        return page

    @property
    def _by_number(self) -> bool:
        return self.are_keys and self.layout is not None and not self.layout.codec.is_raw

    def _encode(self, states: Tensor) -> tuple[Tensor, RecordLayout, list[float]]:
        """Return one record of some pages' rows, its layout, and each page's squared error."""
        assert self.layout is not None
        rows = states.transpose(-1, -2) if self._by_number else states
        rows = rows.reshape(-1, self.layout.cols)
        record = encode(rows, self.layout.codec).to(states.device)
        whole = replace(self.layout, rows=len(rows))
        lost = (rows.float() - _decode(record, whole, self.dtype).float()).reshape(len(states), -1)
        norms: list[float] = torch.linalg.vector_norm(lost, dim=-1, dtype=torch.float64).tolist()
        return record, whole, [norm**2 for norm in norms]


def layer_formats(
    shape: KvShape, tier: KvTier, layer: int, dtype: torch.dtype
) -> tuple[PageFormat, PageFormat]:
    """Return the formats of a layer's keys and of its values at a tier."""
    keys, values = tier.precisions[layer] if tier.precisions is not None else (None, None)
    heads = shape.heads
    return (
        PageFormat(heads=heads, dim=shape.key_dim, dtype=dtype, are_keys=True).at(keys),
        PageFormat(heads=heads, dim=shape.value_dim, dtype=dtype, are_keys=False).at(values),
    )


def encode_pages(
    formats: Sequence[PageFormat], states: Sequence[Tensor]
) -> list[tuple[list[Tensor], float]]:
    """Encode states (heads, whole pages of tokens, dim) each in its format, those of one format
    together. Returns of each its pages, and the sum of their squared errors.
    """
    places: dict[PageFormat, list[int]] = {}
    for place, of in enumerate(formats):
        places.setdefault(of, []).append(place)
    found: dict[int, tuple[list[Tensor], float]] = {}
    for of, alike in places.items():
        stacked = torch.stack([states[place] for place in alike])
        count = stacked.shape[2] // PAGE_TOKENS
        paged = (
            stacked.view(*stacked.shape[:2], count, PAGE_TOKENS, -1).transpose(1, 2).flatten(0, 1)
        )
        pages, errors = of.encode(paged)
        for index, place in enumerate(alike):
            own = slice(index * count, (index + 1) * count)
            found[place] = pages[own], sum(errors[own])
    return [found[place] for place in range(len(states))]


def round_trip_pages(states: Tensor, precision: Precision, *, are_keys: bool) -> Tensor:
    """Return keys, or values, (B, heads, T, dim) as pages of a precision give them back: the first
    page begins with the first token, and what is behind the last whole one stays as it is.
    """
    batch, heads, tokens, dim = states.shape
    pages = tokens // PAGE_TOKENS
    if not pages:
        return states
    of = PageFormat(heads=heads, dim=dim, dtype=states.dtype, are_keys=are_keys).at(precision)
    shape = batch, heads, pages, PAGE_TOKENS, dim
    paged = states[..., : pages * PAGE_TOKENS, :].reshape(shape)
    encoded, _ = of.encode(paged.transpose(1, 2).flatten(0, 1))
    decoded = torch.stack([of.decode(page) for page in encoded])
    whole = decoded.view(batch, pages, heads, PAGE_TOKENS, dim).transpose(1, 2).flatten(2, 3)
    return torch.cat([whole, states[..., pages * PAGE_TOKENS :, :]], dim=2)


def squared_error(states: Tensor, others: Tensor) -> float:
    """Return the sum of squared differences, added up in float64."""
    differences = states.float() - others.float()
    return float(torch.linalg.vector_norm(differences, dtype=torch.float64)) ** 2


def _decode(record: Tensor, layout: RecordLayout, dtype: torch.dtype) -> Tensor:
    if layout.codec.is_raw:
        return decode(record, layout, dtype=dtype)
    ops.prepare(record.device.type)
    arguments = ops.layout_arguments(layout)
    decoded: Tensor = torch.ops.tierhints.decode(record, *arguments, 0, layout.rows, dtype)
    return decoded
