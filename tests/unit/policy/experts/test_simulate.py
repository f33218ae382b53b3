"""Decoding on a clock: what reading ahead hides, what it wastes, and when it is left."""

import pytest
from toy_routing import toy_trace

from lib.policy.experts import ExpertCache
from lib.policy.experts.bounds import least_seconds
from lib.policy.experts.judge import replay
from lib.policy.experts.routing import Call, Trace
from lib.policy.experts.simulate import Machine, Timed, make_guesses, simulate_decode
from lib.policy.experts.speculation import Speculation

SIZES = {layer: [1] * 16 for layer in range(6)}
MACHINE = Machine(seconds_per_byte=1.0, compute_seconds=2.0)


def make_cache(trace: Trace, slots: int = 24, policy: str = "ours") -> ExpertCache:
    return ExpertCache(SIZES, slots, per_token=trace.per_token, policy=policy)


def run(trace: Trace, *, recall: float | None, machine: Machine = MACHINE, switch: bool) -> Timed:
    calls = trace.calls()
    guesses = None if recall is None else make_guesses(calls, ahead=1, recall=recall)
    return simulate_decode(calls, make_cache(trace), machine, guesses=guesses, switch=switch)


@pytest.mark.parametrize("policy", ["ours", "lru"])
def test_on_demand_the_clock_counts_what_the_cache_counts(policy: str) -> None:
    trace = toy_trace("topics")
    cache = make_cache(trace, policy=policy)
    timed = simulate_decode(trace.calls(), cache, MACHINE)
    alone = make_cache(trace, policy=policy)
    replay(trace.calls(), alone)
    assert cache.counters == alone.counters
    assert timed.resident == timed.ready == alone.counters.hits
    assert timed.bytes_read == timed.stall_seconds == alone.counters.missed_bytes
    assert timed.seconds == timed.stall_seconds + 120 * 6 * 2.0 and timed.tokens == 120
    assert timed.tokens_per_second == 120 / timed.seconds
    assert timed.seconds >= least_seconds(1440.0, timed.bytes_read, bytes_per_second=1.0)


def test_right_guesses_are_ready_and_read_no_more() -> None:
    trace = toy_trace("topics")
    alone, ahead = run(trace, recall=None, switch=False), run(trace, recall=1.0, switch=True)
    assert ahead.bytes_wasted == 0
    assert ahead.bytes_read <= 1.04 * alone.bytes_read
    assert ahead.ready_hit > alone.ready_hit + 0.2
    assert ahead.resident_hit == pytest.approx(alone.resident_hit, abs=0.02)
    assert ahead.tokens_per_second > 1.15 * alone.tokens_per_second
    assert ahead.seconds >= least_seconds(1440.0, ahead.bytes_read, bytes_per_second=1.0)


def test_guesses_that_cost_more_than_they_gain_are_left() -> None:
    trace = toy_trace("topics", steps=250)
    slow = Machine(seconds_per_byte=4.0, compute_seconds=1.0)
    alone = run(trace, recall=None, machine=slow, switch=False)
    always = run(trace, recall=0.0, machine=slow, switch=False)
    switched = run(trace, recall=0.0, machine=slow, switch=True)
    assert always.tokens_per_second < 0.93 * alone.tokens_per_second
    assert switched.tokens_per_second > 0.97 * alone.tokens_per_second
    assert switched.bytes_wasted < 0.3 * always.bytes_wasted


def test_a_read_ahead_that_is_on_its_way_is_waited_for_and_not_read_twice() -> None:
    calls = [Call(0, ((0,),), True), Call(1, ((0,),), True)]
    cache = ExpertCache({0: [1, 1], 1: [4, 4]}, 8, per_token={0: 1, 1: 1})
    guesses = {0: [(1, (0,))]}
    timed = simulate_decode(calls, cache, MACHINE, guesses=guesses)
    assert (timed.uses, timed.resident, timed.ready) == (2, 0, 0)
    assert timed.bytes_read == 5 and timed.bytes_wasted == 0
    assert timed.stall_seconds == 1.0 + (4.0 - 2.0)


def test_demand_comes_before_guesses_that_have_not_begun() -> None:
    calls = [Call(0, ((0,),), True), Call(1, ((1,),), True), Call(2, ((0,),), True)]
    cache = ExpertCache({0: [1], 1: [3, 3], 2: [3]}, 16, per_token={0: 1, 1: 1, 2: 1})
    guesses = {0: [(1, (0,)), (2, (0,))]}  # the first is wrong, and on its way at 1 to 4
    timed = simulate_decode(calls, cache, MACHINE, guesses=guesses)
    assert timed.bytes_wasted == 3 and timed.bytes_read == 10
    assert timed.stall_seconds == 1.0 + (1.0 + 3.0) + 1.0


def test_speculation_goes_by_its_balance_and_tries_again() -> None:
    speculation = Speculation()
    assert all(speculation.wants() for _ in range(64))
    speculation.lose(1.0)
    assert not any(speculation.wants() for _ in range(16 * 64))
    assert speculation.wants()
    speculation.gain(5.0)
    assert all(speculation.wants() for _ in range(200))
