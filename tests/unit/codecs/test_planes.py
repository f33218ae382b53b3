import pytest
import torch

from lib.codecs.layout import PLANE_BITS
from lib.codecs.planes import pack_planes, unpack_planes


@pytest.mark.parametrize("plane_bits", sorted(set(PLANE_BITS.values())))
@pytest.mark.parametrize("cols", [64, 192, 1024])
def test_codes_survive_packing(plane_bits: tuple[int, ...], cols: int) -> None:
    bits = sum(plane_bits)
    codes = torch.randint(0, 1 << bits, (7, cols), dtype=torch.uint8)
    codes[0], codes[1] = 0, (1 << bits) - 1
    planes = [torch.empty(7, cols * width // 8, dtype=torch.uint8) for width in plane_bits]
    pack_planes(codes, plane_bits, planes)
    back = torch.empty_like(codes)
    unpack_planes(planes, plane_bits, codes=back, workspace=torch.empty(7 * cols + 5).byte())
    assert torch.equal(back, codes)


def test_the_first_plane_holds_the_highest_bits_and_pieces_of_a_block() -> None:
    codes = torch.arange(64, dtype=torch.uint8).repeat(1, 2)
    codes[:, 64:] ^= 63
    nibbles, crumbs = torch.empty(1, 64, dtype=torch.uint8), torch.empty(1, 32, dtype=torch.uint8)
    pack_planes(codes, (4, 2), (nibbles, crumbs))
    assert nibbles[0, 5] == ((5 >> 2) << 4 | (37 >> 2))
    assert crumbs[0, 5] == ((5 & 3) << 6 | (21 & 3) << 4 | (37 & 3) << 2 | (53 & 3))
    assert nibbles[0, 37] == ((58 >> 2) << 4 | (26 >> 2))
    assert crumbs[0, 21] == ((58 & 3) << 6 | (42 & 3) << 4 | (26 & 3) << 2 | (10 & 3))
