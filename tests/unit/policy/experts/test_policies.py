"""Policies on made-up routing: ours keeps up with the better of LRU and LFU whatever the kind."""

import pytest
from toy_routing import toy_trace

from lib.errors import InputError
from lib.policy.experts import ExpertCache, choice
from lib.policy.experts.choice import ChosenFading
from lib.policy.experts.judge import early_counts, judge, replay, slots_of
from lib.policy.experts.routing import Call, Cell, Trace
from lib.policy.experts.values import FadingUses


@pytest.mark.parametrize("kind", ["zipf", "drift", "topics", "sticky", "uniform"])
def test_ours_is_at_most_a_point_below_the_better_of_lru_and_lfu(kind: str) -> None:
    trace = toy_trace(kind)
    for share in (0.1, 0.3):
        verdict = judge(trace, share)
        best = max(verdict.hit_rate("lru"), verdict.hit_rate("lfu"))
        assert verdict.hit_rate("ours") >= best - 0.01, (share, verdict)
        assert verdict.hit_rate("belady") >= verdict.hit_rate("ours")


@pytest.mark.parametrize("kind", ["zipf", "drift", "topics", "sticky"])
def test_below_the_cycle_ours_holds_on_where_lru_never_hits(kind: str) -> None:
    verdict = judge(toy_trace(kind), 0.1)
    assert verdict.below_cycle
    assert verdict.hit_rate("lru") == 0 and verdict.hit_rate("ours") > 0.15


def test_spare_slots_keep_the_few_that_fit_from_being_flushed() -> None:
    trace = toy_trace("sticky")
    sizes = {layer: [1] * 16 for layer in range(6)}
    hits = []
    for spare in (False, True):
        cache = ExpertCache(sizes, 4, per_token=trace.per_token, spare=spare)
        replay(trace.calls(), cache)
        hits.append(cache.counters.hits)
        assert cache.counters.hits + cache.counters.misses == 120 * 12
    assert hits[1] > 1.5 * hits[0]


def test_the_half_life_goes_where_the_hits_are() -> None:
    steady, turning = toy_trace("zipf", steps=240), toy_trace("sticky", steps=240)
    chosen = []
    for trace in (steady, turning):
        sizes = {layer: [1] * 16 for layer in range(6)}
        cache = ExpertCache(sizes, 20, per_token=trace.per_token)
        replay(trace.calls(), cache)
        assert isinstance(cache.values, ChosenFading)
        chosen.append(cache.values.rates[cache.values.chosen])
    assert chosen[0] < chosen[1]


def test_between_pauses_it_still_finds_the_half_life(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PERIOD": 48, "WATCHED": 24, "SETTLING": 4}.items():
        monkeypatch.setattr(choice, name, value)
    trace = toy_trace("zipf", steps=240)
    cache = ExpertCache(
        {layer: [1] * 16 for layer in range(6)}, 20, per_token=trace.per_token, policy="ours"
    )
    replay(trace.calls(), cache)
    assert isinstance(cache.values, ChosenFading)
    assert cache.values.rates[cache.values.chosen] < 1 / 16


def test_uses_fade_by_half_in_their_half_life() -> None:
    values = FadingUses((2.0,), chosen=0)
    values.touch(0, (0,), 1)
    values.touch(0, (1,), 3)
    assert values.key((0, 1)) - values.key((0, 0)) == pytest.approx(1.0)  # log2 of twice
    values.touch(0, (0,), 3)
    assert 2 ** values.key((0, 0)) / 2 ** values.key((0, 1)) == pytest.approx(1.5)


def test_a_prompt_is_worth_one_use_shared_by_its_tokens() -> None:
    values = FadingUses((float("inf"),), chosen=0)
    values.touch_prompt(0, [(0,), (0,), (0,), (1,)], 1)
    assert 2 ** values.key((0, 0)) == pytest.approx(0.75)
    assert 2 ** values.key((0, 1)) == pytest.approx(0.25)


def test_router_counts_start_the_cache_full_and_warm() -> None:
    trace = toy_trace("zipf", steps=30, prompt=1)
    counts: dict[tuple[int, int], float] = {}
    for cell in toy_trace("zipf", steps=300).cells:
        for index in cell.experts:
            counts[cell.layer, index] = counts.get((cell.layer, index), 0.0) + 1
    hits = []
    for given in (None, counts):
        sizes = {layer: [1] * 16 for layer in range(6)}
        cache = ExpertCache(sizes, 20, per_token=trace.per_token, counts=given)
        assert len(cache.experts()) == (20 if given else 0)
        replay(trace.calls(), cache)
        hits.append(cache.counters.hits)
    assert hits[1] > hits[0]


def test_popularity_goes_by_prompts_and_never_by_what_comes() -> None:
    calls = [Call(0, ((0,), (0,), (1,)), False), Call(0, ((2,),), True)]
    assert early_counts(calls) == {(0, 0): 2, (0, 1): 1}
    assert early_counts([Call(0, ((place,),), True) for place in range(20)]) == {
        (0, 0): 1,
        (0, 1): 1,
    }


def test_calls_go_turn_by_turn_the_prompt_layer_by_layer() -> None:
    cells = (
        Cell(1, False, 0, 0, (3,)),
        Cell(0, True, 2, 1, (1,)),
        Cell(0, True, 2, 0, (0,)),
        Cell(0, False, 1, 0, (1,)),
        Cell(0, False, 0, 1, (2,)),
        Cell(0, False, 0, 0, (0,)),
    )
    layers = {0: 4, 1: 4}
    trace = Trace(model="", experts=layers, per_token=layers, expert_bytes=layers, cells=cells)
    assert trace.calls() == (
        Call(0, ((0,), (1,)), False),
        Call(1, ((2,),), False),
        Call(0, ((0,),), True),
        Call(1, ((1,),), True),
        Call(0, ((3,),), False),
    )
    assert trace.decode_steps == 1


def test_a_share_of_too_few_experts_is_refused_with_what_would_do() -> None:
    trace = toy_trace("zipf", steps=3)
    with pytest.raises(InputError, match=r"give 0\.0209 or more"):
        judge(trace, 0.01)
    assert slots_of(trace, 0.0209) == 2
