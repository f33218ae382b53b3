"""Codes of 2 to 8 bits to planes of 4, 2 and 1 bits, and back.

Which codes share a byte is chosen for speed: byte ``j`` of a row's 4-bit plane holds the codes
``j`` and ``j + row_bytes``, of a 2-bit plane ``j``, ``j + row_bytes``, ``j + 2 * row_bytes`` and
``j + 3 * row_bytes``, the first in the highest bits. A row unpacks into as many contiguous pieces
as codes share a byte, so whole words are shifted at once; neighbours sharing a byte would need a
strided interleave.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor


def pack_planes(codes: Tensor, plane_bits: Sequence[int], planes: Sequence[Tensor]) -> None:
    """Write uint8 codes (n, padded cols) into uint8 planes (n, row_bytes), highest bits first."""
    remaining = sum(plane_bits)
    for bits, plane in zip(plane_bits, planes, strict=True):
        remaining -= bits
        part = codes
        if remaining or plane is not planes[0]:
            part = (codes >> remaining).bitwise_and_((1 << bits) - 1)
        first, *others = part.view(len(codes), 8 // bits, plane.shape[1]).unbind(1)
        torch.bitwise_left_shift(first, 8 - bits, out=plane)
        for place, piece in enumerate(others, start=2):
            torch.add(plane, piece, alpha=1 << (8 - place * bits), out=plane)


def unpack_planes(
    planes: Sequence[Tensor], plane_bits: Sequence[int], *, codes: Tensor, workspace: Tensor
) -> None:
    """Write into ``codes`` (n, padded cols) what the planes (n, row_bytes) hold.

    All are uint8 and contiguous; ``workspace`` is a flat one of at least as many bytes as
    ``codes``, overwritten.
    """
    part = workspace[: codes.numel()].view(codes.shape)
    for index, (bits, plane) in enumerate(zip(plane_bits, planes, strict=True)):
        target = part if index else codes
        # Words are shifted, four bytes at once; what crosses a byte's border is masked away.
        words = plane.view(torch.int32).unsqueeze(1)
        pieces = target.view(torch.int32).view(len(codes), 8 // bits, words.shape[2])
        torch.bitwise_right_shift(words, _shifts(bits, torch.int32, codes.device), out=pieces)
        target.bitwise_and_((1 << bits) - 1)
        if index:
            torch.add(part, codes, alpha=1 << bits, out=codes)


@cache
def _shifts(bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the place in a byte of each code that shares it: (1, 8 / bits, 1)."""
    places = range(8 - bits, -1, -bits)
    return torch.tensor(list(places), dtype=dtype, device=device).view(1, -1, 1)
