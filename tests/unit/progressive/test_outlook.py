"""What running texts will come to take together: simulated, and enumerated."""

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.progressive.decisions import Account, Sizes
from lib.progressive.ladder import KvShape, make_ladder
from lib.progressive.outlook import AnswerLengths, Outlook
from lib.progressive.scheduler import Scheduler

LADDER = make_ladder(KvShape(layers=1, heads=2, key_dim=64, value_dim=64, itemsize=4))
FULL = LADDER.full


def account(prompt: int, done: int, left: int, tier: int, **more: Any) -> Account:
    """Return a request with ``done`` tokens of its answer made and ``left`` to make."""
    of = {"kind": "", "drafts": False, "top": tier, "lowest": tier, "begun": prompt} | more
    tokens = prompt + done if done else 0
    cap = prompt + done + left
    return Account(
        id=0, order=0, prompt=prompt, cap=cap, tier=tier, tokens=tokens, deadline=None,
        decided=False, **of,
    )  # fmt: skip


ACCOUNTS = st.builds(
    account,
    st.integers(1, 400),
    st.integers(0, 100),
    st.integers(0, 300),
    st.integers(0, FULL),
    drafts=st.booleans(),
)


def held_at(sizes: Sizes, request: Account, tokens: int, tier: int | None = None) -> int:
    """Return what a text holds when it has got to so many tokens."""
    then = replace(request, tokens=tokens, settled=max(0, tokens - 1))
    return sizes.grown(then, request.tier if tier is None else tier, sizes.room_for(then, tokens))


def simulate(sizes: Sizes, running: list[Account]) -> int:
    """Give each a token in each step until all have ended; return the most that they held."""
    lengths, most = [each.length for each in running], 0
    while any(length <= each.cap for each, length in zip(running, lengths, strict=True)):
        held = 0
        for number, (each, length) in enumerate(zip(running, lengths, strict=True)):
            if length <= each.cap:
                held += held_at(sizes, each, length)
            lengths[number] += 1
        most = max(most, held)
    return most


@settings(deadline=None)
@given(running=st.lists(ACCOUNTS, min_size=1, max_size=5), portion=st.sampled_from([16, 16, 64]))
def test_the_peak_is_what_a_simulation_comes_to(running: list[Account], portion: int) -> None:
    sizes = Sizes(LADDER, window=16, portion=portion)
    found = Outlook(sizes, quantile=0.5).peak_bytes(running)
    if portion == 16:
        assert found == simulate(sizes, running)
    else:  # the end of a portion counts in the text before its cap, too
        assert found >= simulate(sizes, running)
        assert found <= sum(sizes.whole(each, each.tier) for each in running)


@given(
    answers=st.lists(st.integers(0, 6), max_size=12),
    climbed=st.integers(0, 4),
    drafts=st.booleans(),
)
def test_the_peak_is_the_mean_and_two_deviations_of_all_outcomes(
    answers: list[int], climbed: int, drafts: bool
) -> None:
    sizes = Sizes(LADDER, window=16, portion=16)
    outlook = Outlook(sizes, quantile=0.5, history={"": (climbed, 4)})
    for tokens in answers:
        outlook.lengths.count(tokens, ended=True)
    running = [account(390, 2, 5, 0, drafts=drafts, top=FULL), account(430, 0, 6, 1)]
    outcomes = []
    for each in running:
        reached = outlook.lengths.chances(each.new_tokens, each.cap - each.length)
        ends = -np.diff(reached, append=0.0)  # after so many tokens more
        rate = (climbed / 4 if drafts else outlook.rates.upper("")) * each.left
        ways = [(each.tier, 1.0)] if each.tier == each.top else [(0, 1 - rate), (FULL, rate)]
        outcomes.append(
            [(each, tier, more, p * q) for tier, p in ways for more, q in enumerate(ends)]
        )
    peak = 0.0
    for step in range(7):
        mean = square = 0.0
        for both in itertools.product(*outcomes):
            held = sum(
                held_at(sizes, each, each.length + step, tier)
                for each, tier, more, _ in both
                if step <= more
            )
            chance = math.prod(chance for *_, chance in both)
            mean, square = mean + chance * held, square + chance * held**2
        peak = max(peak, mean + 2 * math.sqrt(max(0.0, square - mean**2)))
    assert outlook.peak_bytes(running) == pytest.approx(peak, rel=1e-6, abs=2)


def test_what_didnt_fit_is_asked_anew_when_something_changes() -> None:
    outlook = Outlook(Sizes(LADDER, window=0, portion=16), quantile=0.5)
    running = [account(400, 1, 50, FULL), account(300, 1, 90, FULL)]
    peak = outlook.peak_bytes(running)
    assert outlook.fits(running, peak)
    assert not outlook.fits(running, peak - 1) and not outlook.fits(running, peak - 1)
    assert outlook.fits(running, peak)
    assert not outlook.fits(running, peak - 1)
    assert outlook.fits(running[:1], peak - 1)
    assert not outlook.fits(running, peak - 1)
    grown = [replace(each, tokens=each.tokens + 16, cap=each.cap - 30) for each in running]
    assert outlook.fits(grown, peak - 1)


def test_chances_are_those_of_answers_seen_and_of_one_that_goes_on() -> None:
    lengths = AnswerLengths()
    assert lengths.chances(3, 2).tolist() == [1, 1, 1]
    for tokens in (1, 1, 3):
        lengths.count(tokens, ended=True)
    assert lengths.chances(0, 5) == pytest.approx([1, 1, 1 / 2, 1 / 2, 1 / 4, 1 / 4])
    assert lengths.chances(2, 2) == pytest.approx([1, 1, 1 / 2])
    assert lengths.chances(9, 1).tolist() == [1, 1]
    cut_off = AnswerLengths([(2, False)] * 6 + [(1, True), (3, True)])
    assert cut_off.chances(0, 4) == pytest.approx([1, 1, 8 / 9, 8 / 9, 4 / 9])
    for _ in range(600):
        lengths.count(9, ended=True)
    assert lengths.chances(0, 9)[-1] == 1  # the latest ones count


@pytest.mark.parametrize("kind", ["full", "calibrated", "verified"])
def test_hardly_any_stands_still_whose_room_was_projected(kind: str) -> None:
    """Prompts and answers of many lengths, each at its cap; as many run as memory has room for."""
    budget = 6 * LADDER.peak_bytes(FULL, 900)
    scheduler = Scheduler(
        LADDER, budget, window=16, growth_tokens=16, soft_quantile=0.5, history={kind: (0, 100)}
    )
    tier = FULL if kind == "full" else 0
    caps = {}
    for number in range(80):
        prompt, new = 100 + number * 37 % 400, 100 + number * 53 % 400
        caps[number] = prompt + new
        scheduler.submit(
            number, prompt, new, tier=tier, top_tier=FULL, kind=kind, drafts=kind == "verified"
        )
    running: dict[int, int] = {}
    used, went_on, stood_still = [], 0, 0
    while caps:
        for each in scheduler.admit(0):
            running[each] = caps[each] - (100 + each * 53 % 400)
        scheduler.granted()
        going = [each for each in running if scheduler.grow(each, running[each])]
        went_on, stood_still = went_on + len(going), stood_still + len(running) - len(going)
        for each in going if kind == "calibrated" else ():
            scheduler.settle(each)
        used.append(scheduler.bytes_held() / budget)
        for each in going:
            running[each] += 1
            if running[each] > caps[each]:
                scheduler.finish(each)
                del running[each], caps[each]
    assert stood_still < 0.002 * went_on  # where one grew just before another gave room back
    first_half = used[: len(used) // 2]
    assert sum(first_half) / len(first_half) > 0.85
