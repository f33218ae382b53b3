"""What the gate of trained mixtures of experts computes, on routes whose answer is known."""

import numpy as np
import pytest

from scripts.experiments.moe.gate_moe import (
    Routes,
    judge,
    lru_hit_rate,
    mutual_information,
    reuse_distance,
)


def routes(experts: list[int], *, tokens: int, seed: int = 0) -> Routes:
    """Tokens of one layer, each with one of the experts, drawn."""
    generator = np.random.Generator(np.random.PCG64(seed))
    return generator.choice(experts, (tokens, 1, 1))


def test_information_is_all_where_the_kind_decides_and_none_where_it_does_not() -> None:
    labels = np.array([0, 0, 1, 1])
    decided = np.array([[[8, 0]], [[4, 0]], [[0, 6]], [[0, 6]]])
    assert mutual_information(decided, labels) == pytest.approx([1])
    assert mutual_information(np.ones((4, 1, 2), np.int64), labels) == pytest.approx([0])


def test_lru_by_hand() -> None:
    stream = np.array([[[0], [0]], [[0], [1]], [[0], [0]]])  # layer 0 stays, layer 1 alternates
    assert lru_hit_rate(stream, 1) == 0, "below a token's experts nothing is ever found"
    assert lru_hit_rate(stream, 2) == 2 / 6
    assert lru_hit_rate(stream, 3) == 3 / 6


def test_reuse_is_counted_in_tokens() -> None:
    assert reuse_distance(np.array([[0, 1], [0, 2], [3, 1]])) == 1.5


def test_experts_that_keep_to_a_kind_pass_and_random_ones_do_not() -> None:
    kinds = ["c"] * 8 + ["json"] * 8
    halves = [[0, 1, 2, 3]] * 8 + [[4, 5, 6, 7]] * 8
    special = [routes(half, tokens=200, seed=n) for n, half in enumerate(halves)]
    found = judge(special, kinds, num_experts=8, seed=0)
    assert found["checks"] == {"information": True, "entropy": True, "lru": True}
    blind = [routes([*range(8)], tokens=200, seed=n) for n in range(16)]
    found = judge(blind, kinds, num_experts=8, seed=0)
    assert not found["passed"] and not found["checks"]["lru"]
    assert found["lru"]["0.25"]["hit"] == pytest.approx(0.25, abs=0.03)
    collapsed = judge([routes([0], tokens=200)] * 16, kinds, num_experts=8, seed=0)
    assert not collapsed["checks"]["entropy"]
