import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.errors import InputError
from lib.precision.allocate import Option
from lib.vocabulary import Precision
from scripts.experiments.allocations.controls import (
    ends_first,
    inverse_givers,
    log_chord,
    permute_curves,
    raise_at_random,
    raise_in_order,
    random_order,
    shuffled_givers,
)

WIDTHS = (Precision.INT4, Precision.INT3, Precision.INT2)


def make_options(sizes: dict[str, int], sensitivity: dict[str, float]) -> dict[str, list[Option]]:
    return {
        name: [
            Option(width, size * bits / 8, size * sensitivity[name] * 4.0**-bits)
            for width, bits in zip(WIDTHS, (4, 3, 2), strict=True)
        ]
        for name, size in sizes.items()
    }


SIZES = {"a": 800, "b": 800, "c": 800, "d": 800}
OPTIONS = make_options(SIZES, {"a": 1.0, "b": 4.0, "c": 2.0, "d": 8.0})


def cost(options: dict[str, list[Option]], precisions: dict[str, Precision]) -> float:
    return sum(
        next(o.cost for o in options[name] if o.precision is precision)
        for name, precision in precisions.items()
    )


def test_order_is_raised_above_the_best_common_width() -> None:
    half = sum(SIZES.values()) * 3.5 / 8
    mix = raise_in_order(OPTIONS, ["d", "b", "a", "c"], cost_budget=half)
    assert mix == {
        "a": Precision.INT3,
        "b": Precision.INT4,
        "c": Precision.INT3,
        "d": Precision.INT4,
    }


def test_a_block_too_large_for_what_is_left_does_not_stop_the_others() -> None:
    options = make_options({"a": 8000, "b": 800, "c": 800}, {"a": 1.0, "b": 1.0, "c": 1.0})
    mix = raise_in_order(options, ["a", "b", "c"], cost_budget=9600 * 2 / 8 + 200)
    assert mix == {"a": Precision.INT2, "b": Precision.INT3, "c": Precision.INT3}


@given(
    st.lists(st.integers(1, 5000), min_size=1, max_size=8),
    st.floats(2.0, 4.0),
    st.integers(0, 100),
)
def test_budgets_are_kept_and_nothing_more_fits(sizes: list[int], bits: float, seed: int) -> None:
    named = {str(i): size for i, size in enumerate(sizes)}
    options = make_options(named, dict.fromkeys(named, 1.0))
    budget = sum(sizes) * bits / 8
    for precisions in (
        raise_in_order(options, random_order(options, seed=seed), cost_budget=budget),
        raise_at_random(options, cost_budget=budget, seed=seed),
    ):
        left = budget - cost(options, precisions)
        assert left >= -1e-6
        for name, precision in precisions.items():
            assert precision is Precision.INT4 or named[name] / 8 > left - 1e-6


def test_a_budget_below_the_lowest_width_is_refused() -> None:
    with pytest.raises(InputError, match="below the lowest precision"):
        raise_at_random(OPTIONS, cost_budget=10, seed=0)


def test_ends_come_first() -> None:
    assert ends_first(["in", "1", "2", "3", "out"]) == ["in", "out", "1", "3", "2"]


def test_inverse_gives_the_most_sensitive_curve_to_the_least_sensitive_block() -> None:
    givers = inverse_givers(OPTIONS, SIZES)
    assert givers == {"a": "d", "c": "b", "b": "c", "d": "a"}
    permuted = permute_curves(OPTIONS, SIZES, givers)
    assert [o.kl for o in permuted["a"]] == [o.kl for o in OPTIONS["d"]]
    assert [o.cost for o in permuted["a"]] == [o.cost for o in OPTIONS["a"]]


def test_permuted_curves_are_per_weight() -> None:
    sizes = {"a": 100, "b": 400}
    options = make_options(sizes, {"a": 1.0, "b": 1.0})
    permuted = permute_curves(options, sizes, {"a": "b", "b": "a"})
    assert [o.kl for o in permuted["a"]] == pytest.approx([o.kl for o in options["a"]])


def test_shuffling_is_a_permutation() -> None:
    assert sorted(shuffled_givers(list(SIZES), seed=3).values()) == sorted(SIZES)


def test_the_log_chord_is_straight_in_log_kl() -> None:
    points = [(4.0, 1e-4), (2.0, 1e-2), (3.0, 1e-3)]
    assert log_chord(points, 2.5) == pytest.approx(10**-2.5)
    assert log_chord(points, 4.0) == pytest.approx(1e-4)
    assert math.isclose(log_chord(points, 3.75), 10**-3.75)
    with pytest.raises(InputError, match="outside the uniform widths"):
        log_chord(points, 1.9)
