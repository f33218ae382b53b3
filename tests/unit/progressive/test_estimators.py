"""Bounds: how each is known, that calibrated ones hold, and what is refused."""

import json
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lib.errors import InputError
from lib.progressive.audit import RequestAudit
from lib.progressive.bounds import Kind, Metric, QualityBound, RequestError
from lib.progressive.calibration import KEYS, Calibration, load_calibration, score_request
from lib.progressive.estimators import (
    NOT_COVERED,
    Bound,
    Calibrated,
    Evidence,
    Full,
    Verified,
    choose_estimator,
    mean_information,
    predict_damage,
)
from lib.progressive.ladder import KvShape, make_ladder

SHAPE = KvShape(layers=2, heads=1, key_dim=64, value_dim=64, itemsize=4)
LADDER = make_ladder(SHAPE).restrict("K3V2 K4V4 K6V5")
FULL = LADDER.full
CALIBRATION = Calibration(
    keys={key: f"{key} 1" for key in KEYS},
    ladder=LADDER,
    information=((2.0, 1.0), (0.5, 0.0)),
    scores=tuple(map(float, range(1, 60))),
    tokens=(400,) * 59,
)
SOME = Evidence(prompt_tokens=400, errors=((10.0, 4.0), (8.0, 9.0)))


def draw_requests(seed: int, *, shift: float = 1.0) -> Iterator[tuple[list[float], list[float]]]:
    """Yield what is predicted and what is true at each tier, of requests whose ratios spread, and
    depend on the tier; ``shift``: by what the truth is larger than it was.
    """
    draw = random.Random(seed)
    while True:
        size, ratio = draw.lognormvariate(-4, 1.5), draw.lognormvariate(0, 0.8)
        predicted = [size * 4.0**-tier for tier in range(FULL)]
        measured = [
            shift * ratio * guess * draw.lognormvariate(0.2 * tier, 0.3)
            for tier, guess in enumerate(predicted)
        ]
        yield predicted, measured


def calibrate(requests: Iterator[tuple[list[float], list[float]]], count: int) -> Calibration:
    drawn = [next(requests) for _ in range(count)]
    scores = tuple(score_request(measured, predicted) for predicted, measured in drawn)
    return replace(CALIBRATION, information=((2.0, 2.0),), scores=scores, tokens=(100,) * count)


def is_broken(
    estimator: Calibrated, request: tuple[list[float], list[float]], epsilon: float
) -> bool:
    """Answer at the first tier whose bound is within epsilon; say if the truth is above."""
    predicted, measured = request
    for tier in range(FULL):
        evidence = Evidence(prompt_tokens=100, errors=((100 * predicted[tier], 0.0),))
        bound = estimator.bound(evidence, tier)
        assert bound is not None
        if bound.value <= epsilon:
            return measured[tier] > epsilon
    return False


# -- the three kinds -------------------------------------------------------------------------------


def test_the_damage_is_the_formula() -> None:
    expected = (2 * 10 + 1 * 4 + 0.5 * 8) / (2 * 400)
    assert predict_damage(CALIBRATION.information, SOME.errors, 400) == pytest.approx(expected)
    bound = Calibrated(CALIBRATION, 0.05).bound(SOME, 1)
    assert bound == Bound(value=59 * expected, kind=Kind.CALIBRATED, delta=0.05)
    with pytest.raises(InputError, match="of 1 layers"):
        predict_damage(CALIBRATION.information, SOME.errors[:1], 400)
    with pytest.raises(InputError, match="nan"):
        predict_damage(CALIBRATION.information, ((math.nan, 1.0), (1.0, 1.0)), 400)


def test_information_is_the_mean_of_a_number() -> None:
    shape = KvShape(layers=1, heads=2, key_dim=8, value_dim=4, itemsize=4)
    layer: Any = SimpleNamespace(keys_trace=32.0, values_trace=16.0)
    assert mean_information([layer], shape) == ((2.0, 2.0),)


def test_at_the_full_tier_every_one_says_0() -> None:
    for estimator in (Full(FULL), Verified(FULL), Calibrated(CALIBRATION, 0.05)):
        assert estimator.bound(SOME, FULL) == Bound(value=0.0, kind=Kind.FULL)
    assert Full(FULL).bound(SOME, 0) is None


def test_verified_is_the_mean_of_what_was_measured() -> None:
    assert Verified(FULL).bound(SOME, 0) is None
    evidence = replace(SOME, measured_nats=0.5, measured_tokens=100)
    assert Verified(FULL).bound(evidence, 0) == Bound(value=0.005, kind=Kind.VERIFIED)


def test_without_an_error_nothing_is_known() -> None:
    evidence = Evidence(prompt_tokens=20, errors=((0.0, 0.0), (0.0, 0.0)))
    assert Calibrated(CALIBRATION, 0.05).bound(evidence, 0) is None


def test_every_kind_says_what_it_doesnt_cover() -> None:
    assert set(NOT_COVERED) == set(Kind)
    assert "unlike" in Bound(value=0.1, kind=Kind.CALIBRATED, delta=0.05).not_covered


def test_a_declared_bound_has_its_estimator() -> None:
    verified = choose_estimator(QualityBound(metric=Metric.EXACT), FULL)
    assert isinstance(verified, Verified)
    assert isinstance(choose_estimator(None, FULL), Full)
    asked = QualityBound(epsilon=0.01, delta=0.05)
    assert isinstance(choose_estimator(asked, FULL, calibration=CALIBRATION), Calibrated)
    with pytest.raises(RequestError, match="no calibration") as error:
        choose_estimator(asked, FULL)
    assert (error.value.param, error.value.code) == ("quality_bound", "calibration_missing")


# -- calibration -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "delta", "largest"),
    [(59, 0.05, 1), (93, 0.05, 2), (124, 0.05, 3), (299, 0.01, 1), (473, 0.01, 2), (628, 0.01, 3)],
)
def test_the_factor_is_the_order_statistic(count: int, delta: float, largest: int) -> None:
    scores = tuple(map(float, random.Random(0).sample(range(count), count)))
    calibration = replace(CALIBRATION, scores=scores, tokens=(1,) * count)
    assert calibration.factor(delta) == count - largest


def test_too_few_requests_are_refused_with_the_least_number() -> None:
    few = replace(CALIBRATION, scores=CALIBRATION.scores[:58], tokens=(400,) * 58)
    with pytest.raises(RequestError, match="takes 59 calibration requests, and there were 58"):
        few.factor(0.05)
    with pytest.raises(RequestError, match="takes 299") as error:
        Calibrated(CALIBRATION, 0.01)
    assert (error.value.param, error.value.code) == ("quality_bound", "calibration_too_small")
    with pytest.raises(RequestError, match="delta is 0"):
        CALIBRATION.factor(0.0)


def test_bounds_hold_for_all_but_delta_whatever_is_asked_and_however_it_is_calibrated() -> None:
    """40 calibrations of 93 requests at 5 %: the share of unseen ones that break their bound."""
    draw = random.Random(7)
    shares = []
    for seed in range(40):
        estimator = Calibrated(calibrate(draw_requests(seed), 93), 0.05)
        unseen = draw_requests(1000 + seed)
        broken = sum(
            is_broken(estimator, next(unseen), draw.lognormvariate(-4, 2)) for _ in range(1500)
        )
        shares.append(broken / 1500)
    assert sum(share > 0.05 for share in shares) <= 2
    assert sum(shares) > 0  # it is no empty promise: some do


def test_a_changed_workload_is_caught_and_nothing_is_released_any_more() -> None:
    audit = RequestAudit(0.05, share=1.0)
    estimator = Calibrated(calibrate(draw_requests(0), 59), 0.05, audit)
    changed = draw_requests(1, shift=20.0)
    draw, requests = random.Random(3), 0
    while not audit.stopped:
        requests += 1
        audit.record(broken=is_broken(estimator, next(changed), draw.lognormvariate(-4, 1)))
    assert requests < 100
    evidence = Evidence(prompt_tokens=100, errors=((1.0, 1.0),))
    assert [estimator.bound(evidence, tier) for tier in range(FULL)] == [None] * FULL
    assert estimator.bound(evidence, FULL) is not None


def test_a_score_is_the_worst_tier() -> None:
    assert score_request([0.1, 0.3], [0.1, 0.1]) == pytest.approx(3)
    assert score_request([-1e-9], [0.1]) == 0
    for measured, predicted in [([0.1], [0.0]), ([math.nan], [0.1]), ([0.1], [math.inf])]:
        with pytest.raises(InputError, match="have no ratio"):
            score_request(measured, predicted)
    with pytest.raises(InputError, match="one per tier"):
        score_request([0.1], [0.1, 0.2])


def test_a_file_gives_the_calibration_back(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    CALIBRATION.save(path)
    assert load_calibration(path, CALIBRATION.keys) == CALIBRATION
    assert load_calibration(path, {"model": "model 1"}) == CALIBRATION


def test_a_calibration_of_something_else_isnt_loaded(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    CALIBRATION.save(path)
    expected = {**CALIBRATION.keys, "codec": "other", "workload": "texts"}
    said = r"another codec \(codec 1 there, other here\), another workload \(workload 1 there"
    with pytest.raises(InputError, match=said):
        load_calibration(path, expected)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "2"},
        {"keys": {"model": "1"}},
        {"scores": []},
        {"scores": [1.0]},
        {"scores": [-1.0] * 59},
        {"scores": ["x"] * 59},
        {"information": [[1.0]]},
        {"ladder": None},
    ],
)
def test_a_file_that_is_no_calibration_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    CALIBRATION.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=r"calibration\.json is no calibration of requests"):
        load_calibration(path, {})
    path.write_text(path.read_text()[:40])
    with pytest.raises(InputError, match="no calibration of requests"):
        load_calibration(path, {})
    with pytest.raises(InputError, match="can't be read"):
        load_calibration(tmp_path / "none.json", {})
