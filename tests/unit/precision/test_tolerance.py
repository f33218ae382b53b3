"""Scales, bands and the safety factor on probes whose errors are known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.errors import InputError
from lib.precision.tolerance import (
    NEGLIGIBLE,
    calibrate,
    in_nats,
    spearman,
    tolerance_limit,
    tolerance_rank,
)


def probes(count: int, seed: int, spread: float = 0.2) -> tuple[list[float], list[float]]:
    random = np.random.default_rng(seed)
    predicted = 10 ** random.uniform(-6, -1, count)
    measured = 1.3 * predicted * np.exp(random.normal(0, spread, count))
    return predicted.tolist(), measured.tolist()


def test_the_scale_is_found() -> None:
    calibration = calibrate(*probes(80, 0))
    assert calibration.scale == pytest.approx(1.3, rel=0.15)
    assert calibration.band[0] < 1 < calibration.band[1] < calibration.conformal_factor
    assert (calibration.fit_probes, calibration.conformal_probes) == (20, 60)
    assert calibration.confidence == 0.95 and not calibration.exhaustive


@pytest.mark.parametrize("count", [80, 140])  # the largest of 60, and the second largest of 105
def test_the_factor_covers_new_pairs_whatever_probes_were_drawn(count: int) -> None:
    enough = []
    for seed in range(300):
        calibration = calibrate(*probes(count, seed))
        predicted, measured = map(np.asarray, probes(2000, seed + 10_000))
        covered = measured <= calibration.conformal_factor * calibration.scale * predicted
        enough.append(covered.mean() >= 0.95)
    assert np.mean(enough) > 0.93  # at least 0.95, within the noise of 300 trials


def test_the_order_statistic_is_the_least_that_covers() -> None:
    binom = pytest.importorskip("scipy.stats").binom
    for count in (59, 60, 92, 93, 124, 500):
        rank = tolerance_rank(count)
        assert binom.cdf(rank - 1, count, 0.95) >= 0.95 > binom.cdf(rank - 2, count, 0.95)
    assert [tolerance_rank(count) for count in (1, 58, 59, 92, 93)] == [1, 58, 59, 92, 92]
    assert tolerance_limit([3.0, 1.0, 2.0]) == 3.0


def test_the_order_statistic_of_a_large_model() -> None:
    for count in (5_000, 50_000):  # the normal approximation, within a few ranks
        about = 0.95 * count + 1.645 * (count * 0.95 * 0.05) ** 0.5
        assert tolerance_rank(count) == pytest.approx(about, abs=3)


def test_negligible_pairs_dont_set_the_factor() -> None:
    predicted, measured = probes(80, 0)
    usual = calibrate(predicted, measured)
    # An expert that hardly a token reaches: off by a factor of a million, and worth nothing.
    off = calibrate([*predicted, 1e-18], [*measured, 1e-12])
    assert off.scale == pytest.approx(usual.scale, rel=0.1)
    assert off.conformal_factor == pytest.approx(usual.conformal_factor, rel=0.1)
    # One that matters does.
    assert calibrate([*predicted, 1e-18], [*measured, 1e-6]).conformal_factor > 100
    assert in_nats(0.0, 2.0) == 0
    assert in_nats(1e-18, 2.0) == NEGLIGIBLE < 2e-3 == in_nats(1e-3, 2.0)


def test_few_probes_say_what_they_are_worth() -> None:
    calibration = calibrate(*probes(16, 0))
    assert calibration.conformal_probes == 12
    assert calibration.confidence == pytest.approx(1 - 0.95**12)


def test_all_pairs_of_a_small_model_are_each_covered() -> None:
    predicted, measured = probes(42, 0)
    calibration = calibrate(predicted, measured, all_pairs=True)
    assert calibration.exhaustive and calibration.confidence == 1
    assert calibration.conformal_probes == calibration.fit_probes == 42
    limit = calibration.conformal_factor * calibration.scale
    assert max(np.asarray(measured) / predicted) == pytest.approx(limit)
    assert not calibrate(*probes(80, 0), all_pairs=True).exhaustive  # 60 are enough


def test_bad_probes_are_refused() -> None:
    with pytest.raises(InputError, match="too few"):
        calibrate([1.0] * 7, [1.0] * 7)
    with pytest.raises(InputError, match="is 0"):
        calibrate([0.0] * 9, [1.0] * 9)


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=2, max_size=30))
def test_spearman_is_scipys(values: list[tuple[int, int]]) -> None:
    stats = pytest.importorskip("scipy.stats")
    first, second = (list(map(float, side)) for side in zip(*values, strict=True))
    ours = spearman(first, second)
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert ours == 0
    else:
        assert ours == pytest.approx(stats.spearmanr(first, second).statistic, abs=1e-12)


def test_spearman_of_orders() -> None:
    assert spearman([1, 2, 30], [0.1, 0.2, 0.3]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
