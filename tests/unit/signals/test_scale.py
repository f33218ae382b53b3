import json
import random

import pytest

from lib.errors import InputError
from lib.signals import MomentScale


def test_constant_steps_give_their_own_values() -> None:
    scale = MomentScale(0.99)
    for _ in range(20):
        scale.update(tokens=512, clip_coefficient=0.5)
    assert scale.values(20) == (512, 0.25)


def test_changing_steps_are_weighted_as_the_moment_weighs_them() -> None:
    draw = random.Random(0)
    steps = [(draw.randint(50, 500), draw.uniform(0.1, 1)) for _ in range(30)]
    scale = MomentScale(0.9)
    moment = 0.0  # of a weight whose per-token Fisher is 1: E[g^2] = c^2 / B
    for tokens, clip in steps:
        scale.update(tokens=tokens, clip_coefficient=clip)
        moment = 0.9 * moment + 0.1 * clip**2 / tokens
    values = scale.values(30)
    assert values is not None
    tokens_per_update, mean_clip_sq = values
    assert moment / (1 - 0.9**30) * tokens_per_update / mean_clip_sq == pytest.approx(1, rel=1e-6)


def test_unknown_steps_hide_the_scale_until_they_have_left_the_window() -> None:
    scale = MomentScale(0.5)
    scale.update(tokens=None, clip_coefficient=1.0)
    scale.update(tokens=64, clip_coefficient=None)
    known = 0
    while scale.values(scale.steps) is None:
        scale.update(tokens=64, clip_coefficient=1.0)
        known += 1
    assert known == 10  # 2^-10 < 0.1 %
    assert scale.values(scale.steps) == (64, 1.0)


def test_moments_older_or_younger_than_the_record_have_no_scale() -> None:
    scale = MomentScale(0.999)
    for _ in range(10):
        scale.update(tokens=64, clip_coefficient=1.0)
    assert scale.values(10) is not None
    assert scale.values(9) is None  # the optimizer was reset
    assert scale.values(1000) is None  # it had taken steps that nobody recorded
    assert scale.coverage(1000) == pytest.approx(0.01574, rel=1e-3)
    assert scale.coverage(0) == 0


def test_a_continued_record_equals_an_unbroken_one() -> None:
    whole, first = MomentScale(0.95), MomentScale(0.95)
    for step in range(1, 9):
        whole.update(tokens=step * 7, clip_coefficient=1 / step)
        if step <= 4:
            first.update(tokens=step * 7, clip_coefficient=1 / step)
    second = MomentScale.from_state_dict(json.loads(json.dumps(first.state_dict())))
    for step in range(5, 9):
        second.update(tokens=step * 7, clip_coefficient=1 / step)
    assert second.state_dict() == whole.state_dict()


@pytest.mark.parametrize(
    ("tokens", "clip", "message"),
    [(0, 1.0, "tokens"), (8, 0.0, "clip"), (8, 1.5, "clip"), (float("nan"), 1.0, "tokens")],
)
def test_impossible_steps_are_refused(tokens: float, clip: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        MomentScale(0.9).update(tokens=tokens, clip_coefficient=clip)


def test_damaged_state_and_beta2_are_refused() -> None:
    with pytest.raises(InputError, match="beta2 1.0"):
        MomentScale(1.0)
    with pytest.raises(InputError, match="damaged"):
        MomentScale.from_state_dict({"beta2": 0.9})
