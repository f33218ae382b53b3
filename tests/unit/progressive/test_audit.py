"""The test that stops releasing: not for nothing, and soon where it must."""

import math
import random

import pytest

from lib.errors import InputError
from lib.progressive.audit import STOP_AT, AuditCounts, RequestAudit, audits_until_stop


def run_audit(rate: float, delta: float, *, audits: int, seed: int) -> int | None:
    """Return after how many audits it stops; None: it doesn't."""
    audit, draw = RequestAudit(delta, share=1.0), random.Random(seed)
    for number in range(1, audits + 1):
        audit.record(broken=draw.random() < rate)
        if audit.stopped:
            return number
    return None


@pytest.mark.parametrize("delta", [0.05, 0.01])
def test_bounds_that_hold_are_stopped_in_fewer_than_one_of_twenty_long_runs(delta: float) -> None:
    stopped = [run_audit(delta, delta, audits=3_000, seed=seed) for seed in range(150)]
    assert sum(each is not None for each in stopped) <= 150 / STOP_AT + 4
    better = [run_audit(delta / 2, delta, audits=3_000, seed=seed) for seed in range(50)]
    assert better == [None] * 50


@pytest.mark.parametrize(
    ("rate", "delta", "mean", "within"),
    [
        (0.1, 0.05, 157, 423),
        (0.2, 0.05, 34, 68),
        (0.5, 0.05, 10, 18),
        (1.0, 0.05, 5, 5),
        (0.1, 0.01, 54, 103),
    ],
)
def test_bounds_that_are_broken_are_caught_as_soon_as_the_table_says(
    rate: float, delta: float, mean: float, within: int
) -> None:
    detection = audits_until_stop(rate, delta)
    assert round(detection.mean) == mean
    assert detection.within == within
    found = [run_audit(rate, delta, audits=5_000, seed=seed) for seed in range(300)]
    counts = [each for each in found if each is not None]
    assert len(counts) == 300
    assert sum(counts) / 300 == pytest.approx(detection.mean, rel=0.25)
    assert sum(each <= within for each in counts) >= 0.9 * 300


def test_a_rate_hardly_above_delta_may_never_be_caught() -> None:
    assert audits_until_stop(0.05, 0.05).mean == math.inf
    assert audits_until_stop(0.07, 0.05).within == math.inf


def test_once_stopped_it_stays_so() -> None:
    audit = RequestAudit(0.05, share=0.5)
    for _ in range(5):
        assert not audit.stopped
        audit.record(broken=True)
    assert audit.stopped
    assert audit.evidence == pytest.approx(32)
    for _ in range(100):
        audit.record(broken=False)
    assert audit.stopped
    assert audit.evidence < 1
    assert audit.counts == AuditCounts(audits=105, broken=5, stopped=True)


def test_who_is_audited_is_drawn_by_number_alone() -> None:
    audit, again = (RequestAudit(0.05, share=0.1, seed=3) for _ in range(2))
    chosen = [number for number in range(20_000) if audit.is_chosen(number)]
    audit.record(broken=True)
    assert chosen == [number for number in range(20_000) if again.is_chosen(number)]
    assert len(chosen) == pytest.approx(2_000, abs=200)
    other = RequestAudit(0.05, share=0.1, seed=4)
    assert sum(other.is_chosen(number) for number in chosen) == pytest.approx(200, abs=60)
    everyone = RequestAudit(0.05, share=1.0)
    assert all(everyone.is_chosen(number) for number in range(1_000))


def test_impossible_settings_are_refused() -> None:
    for delta in (0.0, 0.5, -1.0, math.nan):
        with pytest.raises(InputError, match="delta is"):
            RequestAudit(delta, share=0.1)
    for share in (0.0, 1.1, math.nan):
        with pytest.raises(InputError, match="share of"):
            RequestAudit(0.05, share=share)
