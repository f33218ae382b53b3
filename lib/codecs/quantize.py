"""Weights to codes, scales and zeros: the arithmetic behind ``records.encode``.

It is done in few passes over memory that stays in a processor's caches: some rows at a time, in one
``Workspace``. A code is rounded by adding 1.5 * 2**23 to it in float32, whose neighbours are whole
numbers there (ties go to even numbers, as torch.round's do): its lowest byte is then the code.
"""

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
_WHOLE_NUMBERS = 1.5 * 2**23


class Workspace:
    """Memory for encoding up to ``rows`` rows of a matrix at a time, of codes and not raw."""

    def __init__(self, layout: RecordLayout, rows: int) -> None:
        self.values = torch.empty(rows, layout.cols, dtype=torch.float32, device="cpu")
        self.codes = torch.zeros(rows, layout.padded_cols, dtype=torch.uint8, device="cpu")
        """Of columns that aren't there: 0."""


def quantize_rows(
    rows: Tensor, sections: Sequence[Tensor], layout: RecordLayout, work: Workspace, *, first: int
) -> None:
    """Write some rows' planes, scales and zeros into the views of a record's sections; ``first`` is
    the number of the first row, for the error.
    """
    size, bits = layout.group_size, layout.codec.bits
    values, codes = work.values[: len(rows)], work.codes[: len(rows)]
    if rows.dtype != torch.float32:
        rows = values.copy_(rows)
    scales, zeros = _fit_groups(rows, size, bits, first)
    *planes, all_scales, all_zeros = sections
    all_scales.copy_(scales)
    all_zeros.copy_(zeros)
    shift, scale = zeros.float(), scales.float()
    pairs = zip(group_views(rows, shift, size), group_views(values, scale, size), strict=True)
    for (weights, zero), (groups, step) in pairs:
        torch.sub(weights, zero, out=groups).div_(step)
    middle = 1 << (bits - 1)
    values.clamp_(-middle, middle - 1).add_(_WHOLE_NUMBERS + middle)
    codes[:, : layout.cols].copy_(values.view(torch.int32))  # the lowest byte
    pack_planes(codes, PLANE_BITS[layout.precision], planes)


def _fit_groups(values: Tensor, size: int, bits: int, first: int) -> tuple[Tensor, Tensor]:
    """Choose scales and zeros, bfloat16 (n, groups), that cover each group's range."""
    whole = values.shape[1] // size * size
    parts = [torch.unflatten(values[:, :whole], 1, (-1, size))] if whole else []
    if whole < values.shape[1]:
        parts.append(values[:, whole:].unsqueeze(1))
    low = torch.cat([part.amin(-1) for part in parts], dim=1).double()
    high = torch.cat([part.amax(-1) for part in parts], dim=1).double()
    if not (low.amin() >= -LARGEST_WEIGHT and high.amax() <= LARGEST_WEIGHT):  # so for NaN
        sound = (low >= -LARGEST_WEIGHT) & (high <= LARGEST_WEIGHT)
        raise unsound_row(first + int((~sound).any(1).nonzero()[0]))
    margin, middle = EDGE_MARGIN.get(bits, 0.0), 1 << (bits - 1)
    below, above = middle + margin, middle - 1 + margin
    scale = (high - low).div_(below + above)
    zero = (low + high).add_(scale).div_(2).bfloat16()  # the value itself where all are equal
    # The rounded zero must not push an end of the range out of reach.
    centre = zero.double()
    reach = torch.maximum((centre - low).div_(below), high.sub_(centre).div_(above))
    scale = torch.maximum(scale, reach).clamp_(min=SMALLEST_SCALE)
    rounded = scale.bfloat16()
    short = rounded.double() < scale
    rounded = (rounded.view(torch.int16) + short.to(torch.int16)).view(torch.bfloat16)
    return rounded, zero


def unsound_row(row: int) -> InputError:
    """Make the error for a row with a weight that can't be encoded."""
    return InputError(
        f"row {row} holds a weight that is NaN, infinite or beyond {LARGEST_WEIGHT:.1e}: mend it, "
        "or store this weight as it is"
    )


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
