"""From measured requests to a calibration, and its trial on others."""

import random
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest

from lib.errors import InputError
from lib.evaluation.measured_requests import (
    RequestRow,
    expected_concurrency,
    make_calibration,
    measure_requests,
    try_calibration,
)
from lib.progressive.bounds import quality_of
from lib.progressive.calibration import KEYS
from lib.progressive.generation import GenerationRequest
from lib.progressive.ladder import KvShape, make_ladder
from lib.progressive.measuring import Measurement, OnMeasured

KEYS_HERE = dict.fromkeys(KEYS, "1")
INFORMATION = ((2.0, 1.0),)
SHAPE = KvShape(layers=1, heads=1, key_dim=64, value_dim=64, itemsize=4)
LADDER = make_ladder(SHAPE).restrict("K3V2 K4V4")


def draw_rows(count: int, seed: int) -> list[RequestRow]:
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        size, ratio = draw.lognormvariate(-4, 1), draw.lognormvariate(0, 0.7)
        guesses = [size, size / 10]
        rows.append(
            RequestRow(
                prompt_tokens=300,
                errors=tuple(((200 * guess, 200 * guess),) for guess in guesses),
                measured=tuple(guess * ratio * draw.lognormvariate(0, 0.2) for guess in guesses),
            )
        )
    return rows


def calibrate(rows: list[RequestRow], **changed: object) -> object:
    given = {"keys": KEYS_HERE, "ladder": LADDER, "information": INFORMATION, **changed}
    return make_calibration(rows, **given)  # type: ignore[arg-type]


def test_a_score_is_measured_over_predicted_at_the_worst_tier() -> None:
    row = RequestRow(
        prompt_tokens=100, errors=(((10.0, 20.0),), ((1.0, 2.0),)), measured=(0.1, 0.08)
    )
    calibration = make_calibration([row], keys=KEYS_HERE, ladder=LADDER, information=INFORMATION)
    assert calibration.scores == pytest.approx((0.08 / (4 / 200),))
    assert calibration.tokens == (100,)
    assert row.to_json()["measured"] == (0.1, 0.08)


def test_a_request_that_says_nothing_is_named() -> None:
    rows = draw_rows(3, 0)
    rows[1] = replace(rows[1], errors=(((0.0, 0.0),),) * 2)
    with pytest.raises(InputError, match=r"request 1 \(300 tokens\).*long enough"):
        calibrate(rows)
    with pytest.raises(InputError, match="request 0.*2 tiers were measured, not 1"):
        calibrate(rows, ladder=LADDER.restrict("K3V2"))


def test_unseen_requests_keep_their_bounds_in_nearly_all_calibrations() -> None:
    """20 calibrations of 59 at 5 %, 600 unseen requests each, as many epsilons."""
    held = 0
    for seed in range(20):
        calibration = make_calibration(
            draw_rows(59, seed), keys=KEYS_HERE, ladder=LADDER, information=INFORMATION
        )
        unseen = draw_rows(600, 100 + seed)
        trial = try_calibration(calibration, unseen, epsilon=0.02 * (1 + seed % 5), delta=0.05)
        assert trial.requests == sum(trial.tiers) == 600
        assert trial.tiers[2] < 600
        assert trial.interval[0] <= trial.broken / 600 <= trial.interval[1]
        held += trial.interval[0] <= 0.05
    assert held >= 19


def test_an_epsilon_of_0_is_answered_at_full() -> None:
    calibration = make_calibration(
        draw_rows(59, 0), keys=KEYS_HERE, ladder=LADDER, information=INFORMATION
    )
    trial = try_calibration(calibration, draw_rows(50, 1), epsilon=0.0, delta=0.05)
    assert (trial.tiers, trial.broken) == ((0, 0, 50), 0)
    assert trial.to_json()["interval"][0] == 0


class Engine:
    """Measures in threads, and answers in any order; the last prompt token decides."""

    def __init__(self) -> None:
        self.going = self.most = 0
        self._lock = threading.Lock()

    def measure(
        self, request: GenerationRequest, on_measured: OnMeasured, *, tier: int | None = None
    ) -> None:
        assert tier is not None
        with self._lock:
            self.going += 1
            self.most = max(self.most, self.going)
        threading.Timer(0.001 * (tier + 1), self._tell(request, tier, on_measured)).start()

    def _tell(
        self, request: GenerationRequest, tier: int, on_measured: OnMeasured
    ) -> Callable[[], None]:
        def tell() -> None:
            with self._lock:
                self.going -= 1
            value = float(request.prompt[-1])
            if value == 13:
                on_measured(InputError("request 13"))
                return
            errors = ((value, float(tier)),)
            divergences = (value, value + 2 * tier)
            on_measured(
                Measurement(
                    tier=tier,
                    tokens=(1, 2),
                    quality=quality_of(None, "K4V4"),
                    errors=errors,
                    prompt_tokens=2,
                    divergences=divergences,
                )
            )

        return tell


def test_requests_are_measured_at_all_tiers_some_at_a_time() -> None:
    engine, done = Engine(), []
    requests = [GenerationRequest(prompt=[7, each], max_new_tokens=4) for each in range(10)]
    rows = measure_requests(engine, requests, 3, at_once=4, progress=done.append)
    assert engine.most <= 4
    assert sum(done) == 30
    assert [row.measured for row in rows] == [(v, v + 1.0, v + 2.0) for v in map(float, range(10))]
    assert rows[5].errors == (((5.0, 0.0),), ((5.0, 1.0),), ((5.0, 2.0),))
    failing = [*requests, GenerationRequest(prompt=[13], max_new_tokens=4)]
    with pytest.raises(InputError, match="request 13"):
        measure_requests(Engine(), failing, 2)


def test_the_identity_of_the_seed_figures() -> None:
    assert expected_concurrency(0.38, 0) == pytest.approx(2.63, abs=0.01)
    assert expected_concurrency(0.38, 0.4) == pytest.approx(1.59, abs=0.01)
    assert expected_concurrency(0.38, 1) == 1
    with pytest.raises(InputError, match="shares from 0 to 1"):
        expected_concurrency(0.0, 0.1)
