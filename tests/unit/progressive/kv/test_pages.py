"""States of one request, against plain lists of tokens."""

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lib.errors import InputError
from lib.progressive.kv.formats import round_trip_pages
from lib.progressive.kv.pages import RequestStates
from lib.progressive.ladder import (
    PAGE_TOKENS,
    RECENT_TOKENS,
    SINK_TOKENS,
    KvShape,
    KvTier,
    num_pages,
)
from lib.vocabulary import Precision as P

SHAPE = KvShape(layers=2, heads=3, key_dim=32, value_dim=48, itemsize=4)


def tier(name: str, *precisions: tuple[P, P]) -> KvTier:
    return KvTier(name=name, precisions=precisions or None)


FULL = tier("full")
K8V8 = tier("K8V8", (P.INT8, P.INT8), (P.INT8, P.INT8))
K6V5 = tier("K6V5", (P.INT6, P.INT5), (P.INT6, P.INT5))
K4V4 = tier("K4V4", (P.INT4, P.INT4), (P.INT4, P.INT4))
MIXED = tier("mixed", (P.INT3, P.INT2), (P.BF16, P.INT4))
TIERS = [FULL, K8V8, K6V5, K4V4, MIXED]


def tokens(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return (
        torch.randn(count, SHAPE.heads, SHAPE.key_dim, generator=random),
        torch.randn(count, SHAPE.heads, SHAPE.value_dim, generator=random),
    )


def filled(of: KvTier, length: int) -> RequestStates:
    states = RequestStates(SHAPE, of)
    for layer in range(SHAPE.layers):
        states.append(layer, *tokens(length, layer))
    states.settle()
    return states


@pytest.mark.parametrize("of", TIERS, ids=lambda of: of.name)
@pytest.mark.parametrize("length", [0, 1, 4, 68, 131, 132, 140, 517])
def test_bytes_are_those_that_the_ladder_says(of: KvTier, length: int) -> None:
    states = filled(of, length)
    assert states.length == length
    assert states.num_bytes == of.num_bytes(SHAPE, length)
    in_pieces = RequestStates(SHAPE, of)
    for layer in range(SHAPE.layers):
        for key, value in zip(*tokens(length, layer), strict=True):
            in_pieces.append(layer, key[None], value[None])
    in_pieces.settle()
    assert in_pieces.num_bytes == states.num_bytes
    for found, expected in zip(in_pieces.errors, states.errors, strict=True):
        assert found == pytest.approx(expected, rel=1e-9)
    for one, other in zip(in_pieces.layers, states.layers, strict=True):
        for a, b in zip(one.read(), other.read(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("of", TIERS, ids=lambda of: of.name)
def test_errors_are_those_of_the_pages(of: KvTier) -> None:
    states = filled(of, 300)
    for layer, errors in enumerate(states.errors):
        originals = tokens(300, layer)
        paged = slice(SINK_TOKENS, SINK_TOKENS + num_pages(300) * PAGE_TOKENS)
        for side, original, error in zip(
            states.layers[layer].read(), originals, errors, strict=True
        ):
            difference = side.transpose(0, 1).double() - original.double()
            assert not difference[:SINK_TOKENS].any() and not difference[paged.stop :].any()
            assert float(difference.square().sum()) == pytest.approx(error, rel=1e-9)
            assert (error > 0) == (of is not FULL)


def test_a_number_that_is_large_in_all_keys_costs_the_others_nothing() -> None:
    keys, _ = tokens(4 * PAGE_TOKENS)
    large = keys.clone()
    large[..., 7] += 100
    before, after = (error_of_keys(each) for each in (keys, large))
    assert after < 1.1 * before


def error_of_keys(keys: Tensor) -> float:
    states = keys.transpose(0, 1)[None]
    back = round_trip_pages(states, P.INT4, are_keys=True)
    return float((back - states).square().sum())


@pytest.mark.parametrize("are_keys", [True, False])
@pytest.mark.parametrize("length", [10, 64, 200])
def test_a_round_trip_is_that_of_pages(are_keys: bool, length: int) -> None:
    side = 0 if are_keys else 1
    states = filled(K4V4, SINK_TOKENS + length + RECENT_TOKENS).layers[0].read()[side]
    original = tokens(SINK_TOKENS + length + RECENT_TOKENS, 0)[side].transpose(0, 1)
    some = slice(SINK_TOKENS, SINK_TOKENS + length)
    found = round_trip_pages(original[None, :, some], P.INT4, are_keys=are_keys)
    torch.testing.assert_close(found[0], states[:, some])


def test_climbing_makes_what_would_have_been_made_at_once() -> None:
    states, expected = filled(K4V4, 300), filled(K8V8, 300)
    paged = slice(SINK_TOKENS, states.layers[0].tail_start)
    for layer in range(SHAPE.layers):
        states.rebuild(layer, K8V8, *(side[paged] for side in tokens(300, layer)))
    assert states.tier is K8V8 and states.errors == expected.errors
    assert states.num_bytes == expected.num_bytes
    for one, other in zip(states.layers, expected.layers, strict=True):
        assert all(map(torch.equal, one.read(), other.read()))


@pytest.mark.parametrize("above, below", [(FULL, MIXED), (K8V8, K6V5), (K6V5, K4V4)])
def test_demoted_pages_take_less_and_say_an_upper_bound_of_their_error(
    above: KvTier, below: KvTier
) -> None:
    states = filled(above, 300)
    states.demote(below)
    assert states.tier is below and states.num_bytes == below.num_bytes(SHAPE, 300)
    for layer, errors in enumerate(states.errors):
        read = states.layers[layer].read()
        for side, original, error in zip(read, tokens(300, layer), errors, strict=True):
            true = float((side.transpose(0, 1).double() - original.double()).square().sum())
            assert true <= error * (1 + 1e-9) <= 4 * true
    with pytest.raises(InputError, match="can't be raised"):
        states.demote(above)
    more = tokens(PAGE_TOKENS, 9)
    for layer in range(SHAPE.layers):
        states.append(layer, *more)
    states.settle()
    assert states.num_bytes == below.num_bytes(SHAPE, 300 + PAGE_TOKENS)


def test_dropping_planes_changes_nothing_of_those_left() -> None:
    states = filled(K6V5, 200)
    before = [page[0].clone() for page in states.layers[0].pages]
    states.demote(K4V4)
    for old, (new, _) in zip(before, states.layers[0].pages, strict=True):
        assert torch.equal(old[: len(new)], new)


def test_what_is_in_pages_cannot_be_taken_back() -> None:
    states = filled(K4V4, 140)
    with pytest.raises(InputError, match="those before 68 are in pages"):
        states.crop(67)
    states.crop(68)
    states.settle()
    assert states.length == 68 and states.num_bytes < K4V4.num_bytes(SHAPE, 140)


@dataclass
class Model:
    """What ``RequestStates`` does, with lists of tokens."""

    tokens: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    pages: int = 0

    @property
    def open(self) -> int:
        return SINK_TOKENS + PAGE_TOKENS * self.pages if self.pages else 0


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["append", "crop", "settle", "fill"]),
            st.integers(0, 300),
        ),
        max_size=25,
    )
)
def test_any_order_of_steps_keeps_every_token(steps: list[tuple[str, int]]) -> None:
    states, model = RequestStates(SHAPE, FULL), Model()
    for seed, (step, number) in enumerate(steps):
        keys, values = tokens(number, seed)
        length = len(model.tokens)
        if step in ("append", "fill"):
            model.tokens += zip(keys, values, strict=True)
        elif step == "crop":
            length = max(length - number, model.open)
            del model.tokens[length:]
            states.crop(length)
        for layer in range(SHAPE.layers):
            if step == "append":
                states.append(layer, keys, values)
            elif step == "fill":
                states.fill(layer, keys, values)
        if step == "settle":
            states.settle()
        if step in ("settle", "fill"):
            model.pages = max(model.pages, num_pages(len(model.tokens)))
            assert states.num_bytes <= FULL.num_bytes(SHAPE, len(model.tokens))
        assert states.length == len(model.tokens)
    for layer in states.layers:
        assert len(layer.pages) == model.pages
        for found, expected in zip(layer.read(), zip(*model.tokens, strict=True), strict=False):
            assert torch.equal(found, torch.stack(list(expected), dim=1))
