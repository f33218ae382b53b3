"""Exact limits of a proportion, and ranks that cover."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.errors import InputError
from lib.precision.binomial import (
    at_most,
    covering_rank,
    least_count,
    proportion_interval,
    upper_limit,
)


@settings(deadline=None)
@given(st.integers(1, 400), st.data())
def test_limits_are_where_the_count_is_as_unlikely_as_allowed(
    count: int, data: st.DataObject
) -> None:
    stats = pytest.importorskip("scipy.stats")
    hits = data.draw(st.integers(0, count))
    chance = data.draw(st.floats(0, 1))
    assert at_most(hits, count, chance) == pytest.approx(
        stats.binom.cdf(hits, count, chance), abs=1e-9
    )
    exact = stats.binomtest(hits, count).proportion_ci(0.95, method="exact")
    assert proportion_interval(hits, count) == pytest.approx(tuple(exact), abs=1e-9)


def test_limits_at_the_ends() -> None:
    assert upper_limit(0, 0) == upper_limit(7, 7) == 1
    assert upper_limit(0, 59) == pytest.approx(1 - 0.05 ** (1 / 59))
    assert proportion_interval(0, 0) == (0, 1)
    with pytest.raises(InputError, match="8 hits of 7"):
        upper_limit(8, 7)


@pytest.mark.parametrize(
    ("coverage", "above", "least"),
    [(0.95, 0, 59), (0.95, 1, 93), (0.95, 2, 124), (0.99, 0, 299), (0.99, 1, 473), (0.99, 2, 628)],
)
def test_the_least_counts_of_which_a_rank_covers(coverage: float, above: int, least: int) -> None:
    assert covering_rank(least, coverage, 0.95) == least - above
    before = covering_rank(least - 1, coverage, 0.95)
    assert before == (None if above == 0 else least - above)
    if above == 0:
        assert least_count(coverage, 0.95) == least


def test_counting_needs_no_torch() -> None:
    code = "import sys, lib.precision.binomial; print('torch' in sys.modules)"
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True
    )
    assert done.stdout.strip() == "False"
