"""What the cache of experts keeps whatever it is asked: bytes, what is held, counts, order."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.errors import InputError
from lib.policy.experts import POLICIES, Expert, ExpertCache

ROOT = Path(__file__).parents[4]
LAYERS, EXPERTS, USED = 3, 6, 2
SIZES = {layer: [1 + (layer + index) % 3 for index in range(EXPERTS)] for layer in range(LAYERS)}
PER_TOKEN = dict.fromkeys(range(LAYERS), USED)

chosen = st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=USED, unique=True)
calls = st.one_of(
    st.tuples(st.just("use"), st.integers(0, LAYERS - 1), chosen),
    st.tuples(
        st.just("use_many"), st.integers(0, LAYERS - 1), st.lists(chosen, min_size=1, max_size=5)
    ),
    st.tuples(st.just("predict"), st.integers(0, LAYERS - 1), st.integers(0, EXPERTS - 1)),
    st.tuples(st.just("resize"), st.just(0), st.integers(6, 40)),
    st.tuples(st.just("forget"), st.integers(0, LAYERS - 1), st.integers(0, EXPERTS - 1)),
)


def make(policy: str, capacity: int = 12) -> ExpertCache:
    counts = {(0, 1): 5.0, (1, 2): 3.0, (2, 0): 1.0} if policy == "popularity" else None
    return ExpertCache(SIZES, capacity, per_token=PER_TOKEN, policy=policy, counts=counts)


def size(experts: set[Expert]) -> int:
    return sum(SIZES[layer][index] for layer, index in experts)


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=20, deadline=None)
@given(asked=st.lists(calls, max_size=60))
def test_an_engine_that_does_as_it_is_told_holds_what_the_cache_says(
    policy: str, asked: list
) -> None:
    cache = make(policy)
    held = set(cache.experts())
    uses = predicted = 0
    for kind, layer, what in asked:
        before = set(held)
        if kind == "use":
            admission = cache.use(layer, what)
            uses += len(what)
            assert set(admission.hits) == {index for index in what if (layer, index) in before}
            assert sorted(admission.hits + admission.misses) == sorted(what)
            assert not set(admission.evicted) & {(layer, index) for index in what}
            held -= set(admission.evicted)
            held |= {(layer, index) for index in admission.misses}
            assert {(layer, index) for index in what} <= held
        elif kind == "use_many":
            admission = cache.use_many(layer, what)
            wanted = {index for experts in what for index in experts}
            parts = admission.hits + admission.misses + admission.passing
            assert sorted(parts) == sorted(wanted)
            assert set(admission.evicted) <= before
            assert not set(admission.evicted) & {(layer, index) for index in wanted}
            held -= set(admission.evicted)
            held |= {(layer, index) for index in admission.misses}
        elif kind == "predict":
            evicted = cache.admit_predicted(layer, what)
            if evicted is not None:
                predicted += 1
                held = held - set(evicted) | {(layer, what)}
        elif kind == "resize":
            held -= set(cache.set_capacity(what))
        elif (layer, what) in held:
            cache.forget(layer, what)
            held.remove((layer, what))
        assert held == set(cache.experts()) and all(expert in cache for expert in held)
        assert size(held) == cache.used_bytes <= cache.capacity_bytes
    counters = cache.counters
    assert counters.hits + counters.misses == uses
    assert counters.predicted == predicted >= counters.useful + counters.wasted


def test_another_hash_seed_decides_the_same() -> None:
    program = """
import json, random
from lib.policy.experts import POLICIES, ExpertCache
sizes = {layer: [1, 2, 1, 2, 1, 2, 1, 2] for layer in range(4)}
counts = {(layer, index): index for layer in range(4) for index in range(8)}
said = []
for policy in POLICIES:
    cache = ExpertCache(sizes, 17, per_token=dict.fromkeys(range(4), 2), policy=policy,
                        counts=counts)
    draw = random.Random(5)
    for step in range(100):
        for layer in range(4):
            said.append(cache.use(layer, draw.sample(range(8), 2)).evicted)
            said.append(cache.admit_predicted((layer + 1) % 4, draw.randrange(8)))
    said.append(cache.experts())
print(json.dumps(said))
"""
    said = []
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", program]
        said.append(subprocess.check_output(command, env=environment, cwd=ROOT, text=True))
    assert said[0] == said[1] and len(json.loads(said[0])) == len(POLICIES) * 801


def test_capacity_below_what_a_layer_needs_at_once_is_refused_and_changes_nothing() -> None:
    with pytest.raises(InputError, match=r"6B|6 bytes"):
        make("ours", 5)
    cache = make("ours", 12)
    cache.use(0, (0, 1))
    with pytest.raises(InputError, match="less than one layer needs"):
        cache.set_capacity(5)
    assert cache.capacity_bytes == 12 and (0, 0) in cache
    assert cache.below_cycle and not make("ours", 18).below_cycle


@pytest.mark.parametrize(
    ("layer", "experts", "named"),
    [(9, (0,), "layer 9"), (0, (6,), "expert 6"), (0, (1, 1), "twice"), (0, range(6), "use_many")],
)
def test_what_cannot_be_used_is_named(layer: int, experts: tuple[int, ...], named: str) -> None:
    cache = make("ours", 10)
    with pytest.raises(InputError, match=named):
        cache.use(layer, tuple(experts))
    assert not cache.experts() and cache.counters.steps == 0


def test_speculation_never_takes_what_the_current_step_uses() -> None:
    sizes = {0: [1, 1, 1, 1], 1: [1, 1, 1, 1]}
    cache = ExpertCache(sizes, 2, per_token={0: 2, 1: 2})
    cache.use(0, (0, 1))
    assert cache.admit_predicted(1, 3) is None
    cache = ExpertCache(sizes, 3, per_token={0: 2, 1: 2})
    cache.use(0, (0, 1))
    cache.use(1, (2,))
    assert cache.admit_predicted(0, 2) in [((0, 0),), ((0, 1),)]
    assert cache.admit_predicted(0, 2) is None
    cache.use(0, (2, 3))
    assert (cache.counters.useful, cache.counters.wasted) == (1, 0)


def test_a_prompt_does_not_flush_what_decoding_keeps_using() -> None:
    sizes = {0: [1] * 32}
    cache = ExpertCache(sizes, 8, per_token={0: 2})
    for step in range(40):
        cache.use(0, (step % 4, 4 + step % 4))
    kept = set(cache.experts())
    admission = cache.use_many(0, [(8 + token % 24,) for token in range(240)])
    assert not admission.evicted and set(cache.experts()) == kept
    assert len(admission.passing) == 24
