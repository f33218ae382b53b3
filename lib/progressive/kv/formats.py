"""How a page holds a layer's keys, or its values: a record of ``codecs``, or full."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...codecs import ops
from ...codecs.layout import PLANE_BITS, Codec, RecordLayout
from ...codecs.records import decode, encode
from ...errors import InputError
from ...vocabulary import Precision, precision_rank
from ..ladder import PAGE_TOKENS, KvShape, KvTier, LayerPrecisions


@dataclass(frozen=True, slots=True)
class PageFormat:
    """A page of states (heads, PAGE_TOKENS, dim): the tensor itself, or a record with a row, hence
    a scale and a zero, for each head and token.
    """

    heads: int
    dim: int
    dtype: torch.dtype
    """Of the states."""
    layout: RecordLayout | None
    """None: full. A prefix where planes were dropped: new pages drop them too."""

    @classmethod
    def make(
        cls, heads: int, dim: int, dtype: torch.dtype, precision: Precision | None
    ) -> "PageFormat":
        """Lay out pages at a precision; None: full."""
        layout = None if precision is None else Codec(precision).layout(heads * PAGE_TOKENS, dim)
        return cls(heads, dim, dtype, layout)

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

    def encode(self, states: Tensor) -> tuple[list[Tensor], float]:
        """Return pages of states (pages, heads, PAGE_TOKENS, dim), in new memory, and the sum of
        their squared errors.
        """
        if self.layout is None:
            return [page.clone(memory_format=torch.contiguous_format) for page in states], 0.0
        rows = states.reshape(-1, self.dim)
        record = encode(rows, self.layout.codec).to(states.device)
        whole = self.layout.codec.layout(*rows.shape).prefix(self.layout.precision)
        error = squared_error(rows, _decode(record, whole, self.dtype))
        pages = []
        for start in range(0, len(rows), self.layout.rows):
            page = record.new_zeros(self.layout.num_bytes)
            for here, there, size in whole.row_ranges(start, start + self.layout.rows):
                page[there : there + size] = record[here : here + size]
            pages.append(page)
        return pages, error

    def decode(self, page: Tensor) -> Tensor:
        """Return the states of a page: (heads, PAGE_TOKENS, dim)."""
        if self.layout is None:
            return page
        return _decode(page, self.layout, self.dtype).view(self.heads, PAGE_TOKENS, self.dim)

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
        return self.make(self.heads, self.dim, self.dtype, precision)

    def lower(self, page: Tensor, lowered: "PageFormat") -> Tensor:
        """Return a page of this format in another that ``lowered`` has returned."""
        own, other = self.layout, lowered.layout
        if own is not None and other is not None and own.codec == other.codec:
            return page[: other.num_bytes].clone()
        (page,), _ = lowered.encode(self.decode(page)[None])
        return page


def layer_formats(
    shape: KvShape, tier: KvTier, layer: int, dtype: torch.dtype
) -> tuple[PageFormat, PageFormat]:
    """Return the formats of a layer's keys and of its values at a tier."""
    keys, values = tier.precisions[layer] if tier.precisions is not None else (None, None)
    return (
        PageFormat.make(shape.heads, shape.key_dim, dtype, keys),
        PageFormat.make(shape.heads, shape.value_dim, dtype, values),
    )


def codec_errors(
    keys: Tensor, values: Tensor, precisions: LayerPrecisions | None
) -> tuple[float, float]:
    """Return the sums of squared errors that keys and values (T, heads, dim) of some tokens would
    have in pages at these precisions; None: full, so 0.
    """
    if precisions is None:
        return 0.0, 0.0
    errors = []
    for states, precision in zip((keys, values), precisions, strict=True):
        rows = states.reshape(-1, states.shape[-1])
        codec = Codec(precision)
        record = encode(rows, codec).to(rows.device)
        errors.append(squared_error(rows, _decode(record, codec.layout(*rows.shape), rows.dtype)))
    return errors[0], errors[1]


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
