"""Codes of 2 to 8 bits to planes of 4, 2 and 1 bits, and back.

A row's codes come in blocks of 64, and each plane has the bits of a block in bytes of its own: 32
of a 4-bit plane, 16 of a 2-bit plane, 8 of a 1-bit plane. Which codes share a byte is chosen for
speed: in a block, byte ``j`` of the 4-bit plane holds the codes ``j`` and ``j + 32``, of a 2-bit
plane ``j``, ``j + 16``, ``j + 32`` and ``j + 48``, of a 1-bit plane by eights, the first in the
highest bits. A block unpacks into as many contiguous pieces as codes share a byte, so that whole
words are shifted at once; neighbours sharing a byte would need a strided interleave.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from .layout import BLOCK_CODES


def pack_planes(codes: Tensor, plane_bits: Sequence[int], planes: Sequence[Tensor]) -> None:
    """Write uint8 codes (n, padded cols) into uint8 planes (n, row_bytes), highest bits first."""
    remaining = sum(plane_bits)
    for bits, plane in zip(plane_bits, planes, strict=True):
        remaining -= bits
        part = codes
        if remaining or plane is not planes[0]:
            part = (codes >> remaining).bitwise_and_((1 << bits) - 1)
        block_bytes = BLOCK_CODES * bits // 8
        first, *others = part.view(len(codes), -1, 8 // bits, block_bytes).unbind(2)
        packed = plane.view(len(codes), -1, block_bytes)
        torch.bitwise_left_shift(first, 8 - bits, out=packed)
        for place, piece in enumerate(others, start=2):
            torch.add(packed, piece, alpha=1 << (8 - place * bits), out=packed)


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
        # Words are shifted, eight bytes at once; what crosses a byte's border is masked away.
        words = plane.view(torch.int64).view(-1, 1, BLOCK_CODES * bits // 64)
        pieces = target.view(torch.int64).view(len(words), 8 // bits, words.shape[2])
        pieces.copy_(words.expand_as(pieces))
        target.view(torch.int64).view(len(words), -1).bitwise_right_shift_(
            _shifts(bits, codes.device)
        )
        target.bitwise_and_((1 << bits) - 1)
        if index:
            torch.add(part, codes, alpha=1 << bits, out=codes)


@cache
def _shifts(bits: int, device: torch.device) -> Tensor:
    """Return the place in a byte of the codes in each word of a block: (8,)."""
    places = torch.arange(8 - bits, -1, -bits, dtype=torch.int64, device=device)
    return places.repeat_interleave(BLOCK_CODES * bits // 64)
