"""Bounds below every policy, exact where they say so, each of its own thing."""

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_routing import KINDS, toy_trace

from lib.policy.experts import POLICIES, ExpertCache
from lib.policy.experts.bounds import belady_misses, least_seconds, pfoo_missed_bytes
from lib.policy.experts.judge import replay
from lib.policy.experts.routing import Call

uses = st.lists(
    st.tuples(st.integers(0, 1), st.lists(st.integers(0, 3), min_size=1, max_size=2, unique=True)),
    min_size=1,
    max_size=7,
)


def make_calls(drawn: list[tuple[int, list[int]]], prompt: int = 0) -> list[Call]:
    return [
        Call(layer, (tuple(experts),), place >= prompt)
        for place, (layer, experts) in enumerate(drawn)
    ]


def fewest_by_search(calls: list[Call], sizes: dict[int, list[int]], capacity: int) -> int:
    """Try everything that could be kept after each call; returns the fewest bytes read."""
    best: dict[frozenset, int] = {frozenset(): 0}
    for call in calls:
        used = [(call.layer, index) for index in call.tokens[0]]
        after: dict[frozenset, int] = {}
        for held, read in best.items():
            new = read + sum(sizes[one][two] for one, two in used if (one, two) not in held)
            there = sorted(held | set(used))
            for count in range(len(there) + 1):
                for kept in combinations(there, count):
                    if sum(sizes[one][two] for one, two in kept) <= capacity:
                        key = frozenset(kept)
                        after[key] = min(new, after.get(key, new))
        best = after
    return min(best.values())


@settings(max_examples=40, deadline=None)
@given(drawn=uses, slots=st.integers(1, 4))
def test_belady_is_the_fewest_misses_there_are(drawn: list, slots: int) -> None:
    calls = make_calls(drawn)
    assert belady_misses(calls, slots) == fewest_by_search(calls, {0: [1] * 4, 1: [1] * 4}, slots)


@settings(max_examples=40, deadline=None)
@given(drawn=uses, capacity=st.integers(1, 8))
def test_pfoo_is_no_more_than_the_least_bytes_there_are(drawn: list, capacity: int) -> None:
    calls, sizes = make_calls(drawn), {0: [1, 2, 3, 4], 1: [4, 1, 1, 2]}
    assert pfoo_missed_bytes(calls, sizes, capacity) <= fewest_by_search(calls, sizes, capacity)


@pytest.mark.parametrize("kind", KINDS)
def test_no_policy_is_below_the_bounds(kind: str) -> None:
    trace = toy_trace(kind, steps=30)
    calls = trace.calls()
    for policy in POLICIES:
        for slots in (6, 30):
            sizes = {layer: [3] * 16 for layer in range(6)}
            cache = ExpertCache(sizes, 3 * slots, per_token=trace.per_token, policy=policy)
            replay(calls, cache)
            assert cache.counters.misses >= belady_misses(calls, slots)
            mixed = {layer: [1 + (layer + index) % 4 for index in range(16)] for layer in range(6)}
            cache = ExpertCache(mixed, 2 * slots, per_token=trace.per_token, policy=policy)
            replay(calls, cache)
            assert cache.counters.missed_bytes >= pfoo_missed_bytes(calls, mixed, 2 * slots)


def test_pfoo_with_equal_sizes_is_below_belady_and_says_something() -> None:
    calls = toy_trace("zipf").calls()
    sizes = {layer: [1] * 16 for layer in range(6)}
    for slots in (6, 20, 40):
        least, exact = pfoo_missed_bytes(calls, sizes, slots), belady_misses(calls, slots)
        assert 0.8 * exact <= least <= exact


def test_uses_by_prompts_are_not_counted_and_do_prime() -> None:
    calls = make_calls([(0, [0, 1]), (0, [0, 2])], prompt=1)
    assert belady_misses(calls, 2) == 1
    assert pfoo_missed_bytes(calls, {0: [5, 5, 7]}, 10) == 7


def test_least_seconds_is_the_longer_of_computing_and_reading() -> None:
    assert least_seconds(2.0, 100, bytes_per_second=100.0) == 2.0
    assert least_seconds(2.0, 300, bytes_per_second=100.0) == 3.0
