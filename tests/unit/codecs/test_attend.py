"""Attention of one token for each sequence, on a CPU."""

import pytest
import torch
from torch import Tensor

from lib.codecs import ops


@pytest.fixture(autouse=True)
def kernel() -> None:
    if ops.prepare("cpu") != "native":
        pytest.skip("our kernels were not built")
    torch.manual_seed(0)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, scale: float = 0.125
) -> Tensor:
    found: Tensor = torch.ops.tierhints.attend(query, key, value, mask, scale)
    return found


def expected(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, scale: float = 0.125
) -> Tensor:
    scores = query.double() @ key.double().transpose(-1, -2) * scale
    return (scores if mask is None else scores + mask.double()).softmax(-1) @ value.double()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("shape", [(3, 3, 64, 64), (1, 1, 16, 48), (2, 5, 80, 128)], ids=str)
@pytest.mark.parametrize("length", [1, 5, 128, 131, 700])
def test_it_attends_as_softmax_does(
    batch: int, shape: tuple[int, int, int, int], length: int
) -> None:
    groups, rows, key_size, value_size = shape
    query = torch.randn(batch, groups, rows, key_size) * 3
    key = torch.randn(batch, groups, length, key_size)
    value = torch.randn(batch, groups, length, value_size)
    mask = torch.randn(batch, 1, 1, length)
    for some in (None, mask, mask[:1]):
        found = attend(query, key, value, some)
        assert (found - expected(query, key, value, some)).abs().max() < 2.0**-18


def test_what_is_masked_counts_for_nothing() -> None:
    query, (key, value) = torch.randn(2, 2, 3, 32), torch.randn(2, 2, 2, 500, 32)
    mask = torch.full((2, 1, 1, 500), -torch.inf)
    mask[0, ..., 130:333] = 0
    mask[0, ..., 200:210] = -torch.inf
    mask[1, ..., 0] = 0
    value[:, :, 333:] = torch.nan  # as in a cache that wasn't cleared
    found = attend(query, key, value, mask)
    seen = mask[0, 0, 0] == 0
    assert torch.allclose(
        found[0].double(), expected(query, key[:, :, seen], value[:, :, seen])[0], atol=1e-6
    )
    assert torch.equal(found[1], value[1, :, :1].expand(2, 3, 32))
    assert not attend(query, key, value.nan_to_num(), torch.full_like(mask, -torch.inf)).any()


def test_keys_and_values_may_be_strided() -> None:
    cache = torch.randn(2, 1, 150, 4, 64)
    key, value = cache[0].transpose(1, 2), cache[1].transpose(1, 2)
    query = torch.randn(1, 4, 2, 64)
    assert torch.equal(
        attend(query, key, value), attend(query, key.contiguous(), value.contiguous())
    )
    wide = torch.randn(1, 4, 150, 128)[..., ::2]
    assert torch.equal(attend(query, wide, value), attend(query, wide.contiguous(), value))


def test_a_sequence_gets_the_same_bits_in_any_batch_and_on_any_threads() -> None:
    query, (key, value) = torch.randn(4, 3, 3, 64), torch.randn(2, 4, 3, 900, 64)
    together = attend(query, key, value)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for index in range(4):
            alone = attend(*(each[index : index + 1] for each in (query, key, value)))
            assert torch.equal(alone[0], together[index])
    finally:
        torch.set_num_threads(threads)


def test_what_is_not_finite_is_seen() -> None:
    query, (key, value) = torch.randn(1, 2, 2, 16), torch.randn(2, 1, 2, 9, 16)
    query[0, 1, 0, 3] = torch.nan
    found = attend(query, key, value)
    assert found[0, 1, 0].isnan().all()
    assert found[0, 0].isfinite().all() and found[0, 1, 1].isfinite().all()


def test_scores_that_overflow_downwards_count_for_nothing() -> None:
    query, key = torch.full((1, 1, 1, 16), 1e30), torch.ones(1, 1, 148, 16)
    key[:, :, :128] = -1e30
    value = torch.randn(1, 1, 148, 16)
    found = attend(query * 1e-20, key, value)
    assert torch.allclose(found, value[:, :, 128:].mean(2, keepdim=True), atol=1e-5)
    assert not attend(query, key[:, :, :128], value[:, :, :128]).any()


def test_the_reference_attends_alike() -> None:
    query, (key, value) = torch.randn(2, 2, 3, 32), torch.randn(2, 2, 2, 70, 32)
    mask = torch.zeros(2, 1, 1, 70)
    mask[0], mask[1, ..., :9] = -torch.inf, -torch.inf
    for some in (None, mask):
        torch.testing.assert_close(
            attend(query, key, value, some), ops._attend(query, key, value, some, 0.125)
        )


def test_what_is_expanded_or_empty_is_attended_to() -> None:
    query, key = torch.randn(3, 2, 2, 16), torch.randn(1, 2, 9, 16).expand(3, 2, 9, 16)
    mask = torch.zeros(1, 1, 1, 9).expand(3, 1, 1, 9)
    assert torch.equal(attend(query, key, key, mask), attend(query, key.clone(), key.clone()))
    assert not attend(query, key[:, :, :0], key[:, :, :0]).any()


def test_it_is_an_operator_as_torch_expects() -> None:
    query, (key, value) = torch.randn(1, 2, 3, 32), torch.randn(2, 1, 2, 70, 32)
    for mask in (None, torch.zeros(1, 1, 1, 70)):
        torch.library.opcheck(torch.ops.tierhints.attend, (query, key, value, mask, 0.2))


def test_wrong_shapes_are_refused() -> None:
    query, (key, value) = torch.randn(1, 2, 3, 32), torch.randn(2, 1, 2, 70, 32)
    with pytest.raises(RuntimeError, match="don't fit queries"):
        attend(query, key[:, :1], value)
    with pytest.raises(RuntimeError, match=r"a mask of shape \(batch or 1, 1, 1, length\)"):
        attend(query, key, value, torch.zeros(1, 1, 1, 71))
    with pytest.raises(RuntimeError, match="in float32"):
        attend(query.double(), key.double(), value.double())
    with pytest.raises(RuntimeError, match="multiples of 16"):
        attend(*(each[..., :24] for each in (query, key, value)))
