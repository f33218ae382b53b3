"""The extension encodes to the bytes of the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lib.codecs import records
from lib.codecs.layout import GROUP_SIZES, PLANE_BITS
from lib.codecs.native import Native, load_native
from lib.codecs.records import LARGEST_WEIGHT, Codec, encode, encode_from
from lib.errors import InputError
from lib.vocabulary import Precision

pytestmark = pytest.mark.skipif(load_native().library is None, reason="the extension isn't built")

CODECS = [Codec(precision, size) for precision in PLANE_BITS for size in GROUP_SIZES]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 31), (5, 33), (65, 100), (7, 576), (2, 1000), (300, 64)]


def reference(weight: Tensor, codec: Codec) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "load_native", lambda: Native(None))
        return encode(weight, codec)


def assert_same(weight: Tensor, codec: Codec) -> None:
    ours, expected = encode(weight, codec), reference(weight, codec)
    assert torch.equal(ours, expected), (codec, weight.dtype, (ours != expected).nonzero()[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_weights_of_every_kind(codec: Codec, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for rows, cols in SHAPES:
        weight = torch.randn(rows, cols, generator=generator)
        for row, factor in enumerate((0.0, -0.0, 1e-38, 1e-45, 1e-30, 1e4)):
            weight[row % rows : row % rows + 1] *= factor if rows > 6 else 1.0
        weight[-1] = weight[-1].round() / 4  # ties
        assert_same(weight.to(dtype), codec)
        assert_same((weight.abs() * 0.02 + 5).to(dtype), codec)
        assert_same(torch.full((cols, rows), -0.3).to(dtype).t(), codec)


@settings(deadline=None, max_examples=300)
@given(
    seed=st.integers(0, 2**31),
    codec=st.sampled_from(CODECS),
    dtype=st.sampled_from(DTYPES),
    shift=st.floats(-1e4, 1e4),
    exponent=st.integers(-149, 119),
)
def test_weights_of_any_magnitude(
    seed: int, codec: Codec, dtype: torch.dtype, shift: float, exponent: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 97, generator=generator, dtype=torch.float64)
    weight[1:] += shift
    weight[2:] = (weight[2:] * 2.0**exponent).clamp(-LARGEST_WEIGHT, LARGEST_WEIGHT)
    weight[3] = weight[3].sign() * 2.0**exponent
    most = torch.finfo(dtype).max
    assert_same(weight.clamp(-most, most).to(dtype), codec)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_all_halves(dtype: torch.dtype) -> None:
    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    sound = halves[halves.float().abs() <= LARGEST_WEIGHT]
    sound = sound[: len(sound) // 1024 * 1024].view(-1, 1024)
    assert_same(sound, Codec(Precision.INT8, 32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_those_of_the_whole_and_the_first_bad_one_is_named(dtype: torch.dtype) -> None:
    weight = torch.randn(300, 100).to(dtype)
    codec = Codec(Precision.INT3, 32)
    expected = reference(weight, codec)
    layout = codec.layout(300, 100)
    assert torch.equal(encode_from(lambda a, b: weight[a:b], layout, dtype), expected)
    for bad in (torch.nan, -torch.nan, torch.inf, -torch.inf):
        weight[270, 99] = weight[31, 5] = weight[33, 0] = bad
        with pytest.raises(InputError, match="^row 31 holds a weight that is NaN, infinite or"):
            encode(weight, codec)
    if dtype != torch.float16:
        weight[31, 5] = LARGEST_WEIGHT
        with pytest.raises(InputError, match="^row 33 "):
            encode(weight, codec)
        weight[31, 5] = -LARGEST_WEIGHT * 1.01
        with pytest.raises(InputError, match="^row 31 "):
            encode(weight, codec)
