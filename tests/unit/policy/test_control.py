import json
import os
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_control import Machine, floor_of, toy_facts

from lib.errors import InputError
from lib.policy.control import Bucket, Controller, Settings
from lib.policy.events import Move, Refuse, Replan, read_observation, write_event
from lib.vocabulary import Tier

SETTINGS = Settings(dwell_us=1_000, refill_us=2_000, tokens=4, step_bytes=100)
SIZES = [10, 10, 40, 40, 10, 40, 40]


def test_a_smaller_limit_is_kept_at_once_and_a_larger_one_after_the_dwell() -> None:
    machine = Machine(toy_facts(SIZES), SETTINGS)
    machine.ask(120)
    assert machine.fast_bytes <= 120
    assert machine.limit == 120
    held = machine.fast_bytes
    machine.time_us = 999
    machine.ask(None)
    assert machine.fast_bytes == held
    machine.tick(1)
    assert machine.fast_bytes > held
    machine.tick()
    assert machine.fast_bytes == sum(SIZES)
    assert machine.num_slots == 0


def test_no_more_leaves_than_has_to() -> None:
    machine = Machine(toy_facts([10, 10, 100, 100, 100, 100]), SETTINGS)
    machine.ask(419)  # two slots of 100, two blocks of 100 and one of 10 stay
    assert machine.fast_bytes == 410


def test_equal_blocks_leave_at_even_distances() -> None:
    machine = Machine(toy_facts([10] * 12), SETTINGS)
    machine.ask(100)
    away = [int(name[1:]) for name, tier in machine.tiers.items() if tier is not Tier.HBM]
    assert len(away) == 4
    assert {right - left for left, right in zip(away, away[1:], strict=False)} == {3}


def test_below_the_floor_nothing_changes() -> None:
    blocks = toy_facts(SIZES, pinned=2)
    machine = Machine(blocks, SETTINGS)
    machine.ask(120)
    digest, tiers = machine.controller.asked_bytes, dict(machine.tiers)
    machine.ask(floor_of(blocks) - 1)
    assert isinstance(machine.decisions[-1], Refuse)
    assert (machine.controller.asked_bytes, machine.tiers) == (digest, tiers)


def test_at_the_floor_one_slot_does() -> None:
    blocks = toy_facts(SIZES, pinned=2)
    machine = Machine(blocks, SETTINGS)
    machine.ask(floor_of(blocks))
    assert machine.fast_bytes == floor_of(blocks)
    assert machine.num_slots == 1


def test_what_single_moves_cannot_reach_is_left_to_the_planner() -> None:
    machine = Machine(toy_facts(SIZES), SETTINGS)
    machine.controller.floor_bytes = 20  # the planner knows better
    machine.ask(30)
    assert isinstance(machine.decisions[-1], Replan)


def test_a_block_has_so_many_transitions_and_then_waits() -> None:
    machine = Machine(toy_facts([10] * 4), SETTINGS)
    for _ in range(20):
        machine.ask(20)
        machine.ask(None)
        machine.tick(1_000)
    seconds = machine.time_us
    counts = Counter(name for _, name, _ in machine.moves)
    assert max(counts.values()) <= SETTINGS.tokens + seconds // SETTINGS.refill_us


def test_a_failed_decision_is_taken_back() -> None:
    machine = Machine(toy_facts(SIZES), SETTINGS)
    machine.ask(120, fails=True)
    assert machine.controller.limit_bytes is machine.controller.asked_bytes is None
    assert machine.fast_bytes == sum(SIZES)
    machine.ask(120)
    assert machine.fast_bytes <= 120


def test_a_hint_of_the_system_is_followed_down_and_up_after_the_dwell() -> None:
    blocks = toy_facts(SIZES)
    machine = Machine(blocks, SETTINGS)
    machine.hint(60)
    low = machine.fast_bytes
    assert floor_of(blocks) <= low <= sum(SIZES) - 60
    machine.hint(-500)
    machine.tick()
    assert machine.fast_bytes == low
    machine.time_us += 1_000
    machine.hint(-500)
    machine.tick()
    machine.tick()
    assert machine.fast_bytes == sum(SIZES)


def test_another_budget_that_others_have_set_is_the_operators() -> None:
    machine = Machine(toy_facts(SIZES), SETTINGS)
    machine.limit = 500
    machine.hold(decided=False)
    assert machine.controller.asked_bytes == machine.controller.limit_bytes == 500


@given(takes=st.lists(st.integers(0, 5_000), max_size=40))
def test_a_bucket_gives_no_more_than_its_rate(takes: list[int]) -> None:
    bucket, time, given_away = Bucket(SETTINGS, 0), 0, 0
    for wait in takes:
        time += wait
        if bucket.count(time):
            bucket.take(time)
            given_away += 1
        assert given_away <= SETTINGS.tokens + time // SETTINGS.refill_us


STEPS = st.one_of(
    st.tuples(st.just("ask"), st.one_of(st.none(), st.integers(0, 400)), st.booleans()),
    st.tuples(st.just("tick"), st.integers(0, 1_500), st.booleans()),
    st.tuples(st.just("hint"), st.integers(-200, 200), st.booleans()),
)


@settings(max_examples=int(os.environ.get("CONTROL_EXAMPLES", "100")), deadline=None)
@given(
    sizes=st.lists(st.sampled_from([5, 10, 40]), min_size=1, max_size=9),
    pinned=st.integers(0, 3),
    steps=st.lists(STEPS, max_size=25),
)
def test_any_observations_lead_to_legal_moves_within_the_limit(
    sizes: list[int], pinned: int, steps: list[tuple[str, Any, bool]]
) -> None:
    """The machine asserts that each block moves from where it is, that nothing passes a limit, and
    that nothing comes before its dwell.
    """
    machine = Machine(toy_facts(sizes, pinned=pinned), SETTINGS)
    for kind, value, fails in steps:
        if kind == "ask":
            machine.ask(value, fails=fails)
            limit = machine.controller.limit_bytes
            assert machine.fast_bytes <= (2**62 if limit is None else limit)
        elif kind == "tick":
            machine.tick(value)
        else:
            machine.hint(value)
        floor = machine.controller.floor_bytes
        assert machine.limit is None or machine.limit >= min(floor, sum(sizes))
    counts = Counter(name for _, name, _ in machine.moves)
    most = SETTINGS.tokens + machine.time_us // SETTINGS.refill_us
    assert max(counts.values(), default=0) <= most
    again = Controller(SETTINGS)
    decisions = [again.observe(event) for event in machine.events]
    assert [each for each in decisions if each is not None] == machine.decisions
    assert again.digest() == machine.controller.digest()


def test_a_log_gives_the_same_decisions_under_another_hash_seed() -> None:
    machine = Machine(toy_facts(SIZES * 3), SETTINGS)
    for limit in (300, 150, None, 200):
        machine.ask(limit)
        machine.tick(700)
        machine.tick(700)
    lines = [json.dumps(write_event(event)) for event in machine.events]
    code = (
        "import json, sys\n"
        "from lib.policy.control import Controller, Settings\n"
        "from lib.policy.events import read_observation, write_event\n"
        f"controller = Controller({SETTINGS!r})\n"
        "for line in sys.stdin:\n"
        "    decision = controller.observe(read_observation(json.loads(line)))\n"
        "    if decision is not None: print(json.dumps(write_event(decision)))\n"
        "print(controller.digest())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    want = [json.dumps(write_event(each)) for each in machine.decisions]
    assert done.stdout.splitlines() == [*want, machine.controller.digest()]


def test_observations_survive_their_log_and_others_are_refused() -> None:
    machine = Machine(toy_facts(SIZES), SETTINGS)
    machine.ask(120)
    machine.hint(-3)
    for event in machine.events:
        assert read_observation(json.loads(json.dumps(write_event(event)))) == event
    with pytest.raises(InputError, match="kind 'Guess'"):
        read_observation({"kind": "Guess"})
    with pytest.raises(InputError, match="'waited_share'"):
        read_observation({"kind": "Tick", "sequence": 0, "time_us": 0})
    assert any(isinstance(decision, Move) for decision in machine.decisions)
