"""Attention over states in pages: our kernel against decoded states in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lib.codecs import ops
from lib.progressive.kv.attention import (
    append_rows,
    append_tokens,
    attend,
    attend_reference,
    read_rows,
)
from lib.progressive.kv.pages import RequestStates
from lib.progressive.ladder import KvShape, KvTier
from lib.vocabulary import Precision as P

TIERS: dict[str, tuple[P, P] | None] = {
    "full": None,
    "K8V8": (P.INT8, P.INT8),
    "K6V5": (P.INT6, P.INT5),
    "K4V4": (P.INT4, P.INT4),
    "K3V2": (P.INT3, P.INT2),
    "raw": (P.BF16, P.FP32),
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def native() -> None:
    if ops.prepare("cpu") != "native":
        pytest.skip("our kernels were not built")


def make(
    length: int,
    name: str = "K6V5",
    dims: tuple[int, int, int] = (3, 64, 64),
    dtype: torch.dtype = torch.float32,
) -> RequestStates:
    """Return a request's one layer of ``dims``: heads, size of a key, of a value."""
    heads, key_dim, value_dim = dims
    shape = KvShape(
        layers=1, heads=heads, key_dim=key_dim, value_dim=value_dim, itemsize=dtype.itemsize
    )
    pair = TIERS[name]
    tier = KvTier(name=name, precisions=None if pair is None else (pair,))
    states = RequestStates(shape, tier, dtype=dtype)
    keys = 1 + torch.randn(length, heads, key_dim, dtype=dtype)
    states.append(0, keys, torch.randn(length, heads, value_dim, dtype=dtype))
    states.settle()
    return states


def expected(
    queries: Tensor, states: list[RequestStates], softcap: float | None, window: int | None
) -> Tensor:
    found = []
    for query, request in zip(queries.double(), states, strict=True):
        first = 0 if window is None else max(0, request.length - window)
        keys, values = (side[:, first:].double() for side in request.layers[0].read())
        rows = query.view(len(keys), -1, query.shape[-1])
        scores = rows @ keys.transpose(-1, -2) * 0.125
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        found.append((scores.softmax(-1) @ values).flatten(0, 1))
    return torch.stack(found)


@pytest.mark.parametrize("name", TIERS)
@pytest.mark.parametrize("dims", [(3, 64, 64), (1, 16, 48), (2, 80, 128)], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_it_attends_as_softmax_does(name: str, dims: tuple[int, int, int], rows: int) -> None:
    states = [make(length, name, dims) for length in (1, 5, 131, 140, 700)]
    queries = torch.randn(len(states), rows * dims[0], dims[1])
    for softcap, window in ((None, None), (3.0, None), (None, 40), (30.0, 290)):
        found = attend(queries, states, 0, 0.125, softcap=softcap, window=window)
        true = expected(queries, states, softcap, window)
        assert (found - true).abs().max() < 2.0**-17
        layers = [request.layers[0] for request in states]
        slow = attend_reference(queries, layers, 0.125, softcap=softcap, window=window)
        assert (slow - true).abs().max() < 2.0**-17


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(list(TIERS)), st.integers(1, 400)), min_size=1, max_size=5),
    st.integers(0, 80),
)
def test_tokens_are_appended_and_seen(requests: list[tuple[str, int]], more: int) -> None:
    states = [make(length, name) for name, length in requests]
    for request in states[1:]:  # of other tiers than their neighbours
        request.crop(max(request.layers[0].first_open, request.length - 3))
    keys, values = torch.randn(2, more, len(states), 3, 64)
    for key, value in zip(keys, values, strict=True):
        append_tokens(states, 0, key, value)
    queries = torch.randn(len(states), 9, 64)
    assert (
        attend(queries, states, 0, 0.125) - expected(queries, states, None, None)
    ).abs().max() < (2.0**-17)
    for request in states:
        request.settle()
    assert (
        attend(queries, states, 0, 0.125) - expected(queries, states, None, None)
    ).abs().max() < (2.0**-17)
    if more:
        tail = states[0].layers[0].read()[0][:, -1]
        assert torch.equal(tail, keys[-1, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("length", [3, 100, 300])
def test_rows_are_added_and_read_where_they_are_full(length: int, dtype: torch.dtype) -> None:
    states = make(length, dtype=dtype)
    torch.manual_seed(0)
    others = make(length, dtype=dtype)
    added = [torch.randn(37, 3, 64, dtype=dtype) for _ in range(2)]
    append_rows(states, 0, *added)
    others.append(0, *added)
    for start, end in ((0, min(4, length)), (states.layers[0].tail_start, length + 37)):
        found = [torch.empty(max(0, end - start), 3, 64, dtype=dtype) for _ in range(2)]
        read_rows(states, 0, start, *found)
        for one, side in zip(found, others.layers[0].read_full(start, end), strict=True):
            assert torch.equal(one, side.transpose(0, 1))


@pytest.mark.usefixtures("native")
def test_only_full_rows_are_read() -> None:
    states = make(300)
    room = torch.empty(8, 3, 64)
    with pytest.raises(RuntimeError, match="token 4 isn't full"):
        read_rows(states, 0, 0, room, room.clone())
    with pytest.raises(RuntimeError, match="token 308 isn't full"):
        read_rows(states, 0, 304, room, room.clone())
    with pytest.raises(RuntimeError, match="room for tokens of 3 heads"):
        read_rows(states, 0, 0, room[:2], room[:2, :1])


def test_pages_that_dropped_planes_are_attended_to() -> None:
    states = [make(300, "K8V8"), make(300, "K6V5"), make(300, "full")]
    tier = KvTier(name="K4V4", precisions=((P.INT4, P.INT4),))
    for request in states:
        attend(torch.randn(1, 9, 64), [request], 0, 0.125)  # has a table made
        request.demote(tier)
    queries = torch.randn(3, 9, 64)
    difference = attend(queries, states, 0, 0.125) - expected(queries, states, None, None)
    assert difference.abs().max() < 2.0**-17


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["full", "K6V5"])
def test_halves_are_attended_to_in_float32(name: str, dtype: torch.dtype) -> None:
    states = [make(length, name, dtype=dtype) for length in (3, 200)]
    append_tokens(states, 0, *torch.randn(2, 2, 3, 64, dtype=dtype))
    queries = torch.randn(2, 9, 64, dtype=dtype)
    found = attend(queries, states, 0, 0.125)
    assert found.dtype == dtype
    # What is decoded is rounded to halves; what the kernel computes with is not.
    true = expected(queries, states, None, None).to(dtype)
    torch.testing.assert_close(found, true, atol=2.0**-8, rtol=2.0**-6)


def test_heads_that_the_kernel_does_not_take_are_computed_in_torch() -> None:
    states = [make(200, "K6V5", (2, 24, 40))]
    append_tokens(states, 0, torch.randn(1, 2, 24), torch.randn(1, 2, 40))
    queries = torch.randn(1, 4, 24)
    difference = attend(queries, states, 0, 0.125) - expected(queries, states, None, None)
    assert difference.abs().max() < 2.0**-17


def test_a_request_gets_the_same_bits_in_any_batch_and_on_any_threads() -> None:
    states = [make(length, name) for length, name in zip((900, 300, 77, 500), TIERS, strict=False)]
    queries = torch.randn(4, 9, 64)
    together = attend(queries, states, 0, 0.125)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for index, request in enumerate(states):
            alone = attend(queries[index : index + 1], [request], 0, 0.125)
            assert torch.equal(alone[0], together[index])
    finally:
        torch.set_num_threads(threads)


def test_what_is_wrong_is_refused(native: None) -> None:
    states = make(200)
    table = states.layers[0].table
    kernel = torch.ops.tierhints.attend_pages
    with pytest.raises(RuntimeError, match="don't fit 3 heads of 64"):
        kernel(torch.randn(1, 9, 48), [table], [200], 0.125, 0.0, 0)
    with pytest.raises(RuntimeError, match="of 1000 tokens was expected"):
        kernel(torch.randn(1, 9, 64), [table], [1000], 0.125, 0.0, 0)
    with pytest.raises(RuntimeError, match="a query, a table and a length"):
        kernel(torch.randn(2, 9, 64), [table], [200], 0.125, 0.0, 0)
    with pytest.raises(RuntimeError, match="a table of places"):
        kernel(torch.randn(1, 9, 64), [table[:9]], [200], 0.125, 0.0, 0)
    with pytest.raises(RuntimeError, match="requests of one shape"):
        other = make(200, dims=(3, 64, 32)).layers[0].table
        kernel(torch.randn(2, 9, 64), [table, other], [200, 200], 0.125, 0.0, 0)
    with pytest.raises(RuntimeError, match="token 20 isn't full"):
        token = torch.randn(1, 3, 64)
        torch.ops.tierhints.append_states(token, token, [table], [20])
