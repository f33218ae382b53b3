"""Weights to codes, scales and zeros: the arithmetic behind ``records.encode``."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InputError
from .layout import PLANE_BITS, RecordLayout
from .planes import pack_planes

SMALLEST_SCALE = 2.0**-100
"""Weights of a group may be nearer to each other than any scale; this keeps all arithmetic normal.
"""
LARGEST_WEIGHT = 2.0**120
"""Above it the range of a group could overflow float32."""
EDGE_MARGIN = {2: 0.375, 3: 0.375, 4: 0.125}
"""Scales by which a group's extremes may lie beyond its outermost codes, by bits; at most 1/2, so
that the error bound holds. With few codes the finer scale is worth more than exact extremes
(measured: docs/codecs.md).
"""


def quantize_rows(
    rows: Tensor, sections: Sequence[Tensor], layout: RecordLayout, start: int
) -> None:
    """Write some rows' planes, scales and zeros into the views of a record's sections; ``start`` is
    the number of the first row, for the error.
    """
    values = rows.to(torch.float32, copy=True)
    size, bits = layout.group_size, layout.codec.bits
    scales, zeros = _fit_groups(values, size, bits, start)
    *planes, all_scales, all_zeros = sections
    all_scales.copy_(scales)
    all_zeros.copy_(zeros)
    for groups, zero in group_views(values, zeros.float(), size):
        groups.sub_(zero)
    for groups, scale in group_views(values, scales.float(), size):
        groups.div_(scale)
    middle = 1 << (bits - 1)
    codes = torch.zeros(len(values), layout.padded_cols, dtype=torch.uint8)
    codes[:, : layout.cols] = values.round_().add_(middle).clamp_(0, 2 * middle - 1)
    pack_planes(codes, PLANE_BITS[layout.precision], planes)


def _fit_groups(values: Tensor, size: int, bits: int, start: int) -> tuple[Tensor, Tensor]:
    """Choose scales and zeros, bfloat16 (n, groups), that cover each group's range."""
    parts = [torch.unflatten(values, 1, (-1, size))] if values.shape[1] % size == 0 else None
    if parts is None:
        whole = values.shape[1] // size * size
        parts = [values[:, whole:].unsqueeze(1)]
        if whole:
            parts.insert(0, torch.unflatten(values[:, :whole], 1, (-1, size)))
    low = torch.cat([part.amin(-1) for part in parts], dim=1).double()
    high = torch.cat([part.amax(-1) for part in parts], dim=1).double()
    sound = (low >= -LARGEST_WEIGHT) & (high <= LARGEST_WEIGHT)  # False for NaN too
    if not sound.all():
        row = start + int((~sound).any(1).nonzero()[0])
        raise InputError(
            f"row {row} holds a weight that is NaN, infinite or beyond {LARGEST_WEIGHT:.1e}: mend "
            "it, or store this weight as it is"
        )
    margin, middle = EDGE_MARGIN.get(bits, 0.0), 1 << (bits - 1)
    below, above = middle + margin, middle - 1 + margin
    scale = (high - low) / (below + above)
    zero = ((low + high + scale) / 2).bfloat16()  # the value itself where all are equal
    # The rounded zero must not push an end of the range out of reach.
    centre = zero.double()
    scale = torch.maximum(scale, torch.maximum((centre - low) / below, (high - centre) / above))
    scale.clamp_(min=SMALLEST_SCALE)
    rounded = scale.bfloat16()
    short = rounded.double() < scale
    rounded = (rounded.view(torch.int16) + short.to(torch.int16)).view(torch.bfloat16)
    return rounded, zero


def group_views(values: Tensor, parameters: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """Pair views of values (n, cols) with the parameters that broadcast over them."""
    whole = values.shape[1] // size
    parameters = parameters.unsqueeze(-1)
    pairs = []
    if whole:
        pairs.append(
            (torch.unflatten(values[:, : whole * size], 1, (whole, size)), parameters[:, :whole])
        )
    if values.shape[1] % size:
        pairs.append((values[:, whole * size :].unsqueeze(1), parameters[:, whole:]))
    return pairs
