"""A budget that changes under running requests: kept at once, and no answer is another for it."""

import random
import time
from collections.abc import Iterator
from queue import Queue
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from lib.errors import InputError
from lib.progressive.bounds import Kind, Metric, QualityBound
from lib.progressive.calibration import KEYS, Calibration
from lib.progressive.engine import Engine
from lib.progressive.generation import Finish, GenerationRequest, Outcome
from lib.progressive.ladder import make_ladder
from lib.progressive.served import ServedModel
from tests.answers import Answer
from tests.tiny_models import served_llama

ROOMY = 2**24
EXACT = QualityBound(metric=Metric.EXACT)
BOUNDS = (
    None,
    EXACT,
    QualityBound(epsilon=0.02),
    QualityBound(epsilon=0.003),
    *(QualityBound(epsilon=epsilon, delta=0.05) for epsilon in (1e-9, 2e-4, 2e-3, 1.0)),
)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return served_llama(max_position_embeddings=600, initializer_range=0.2)


@pytest.fixture(scope="module")
def calibration(model: Any) -> Calibration:
    served = ServedModel(model)
    served.close()
    return Calibration(
        keys=dict.fromkeys(KEYS, "1"),
        ladder=make_ladder(served.shape),
        information=((1e-3, 1e-3),) * 2,
        scores=(1.0,) * 59,
        tokens=(200,) * 59,
    )


@pytest.fixture
def engine(model: Any, calibration: Calibration) -> Iterator[Engine]:
    with Engine(model, kv_budget=ROOMY, calibration=calibration, prefix_bytes=0) as engine:
        yield engine


def request(seed: int, bound: QualityBound | None, new: int = 60) -> GenerationRequest:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(50, (90 + 37 * seed % 230,), generator=generator).tolist()
    return GenerationRequest(prompt=ids, max_new_tokens=new, bound=bound)


def need(engine: Engine, requests: list[GenerationRequest], at_once: float) -> int:
    """Return a budget for so many of the longest requests in full."""
    longest = max(len(each.prompt) + each.max_new_tokens for each in requests) + 17
    return engine.fixed_bytes + int(at_once * longest * engine.shape.token_bytes)


def ask(engine: Engine, requests: list[GenerationRequest]) -> list[Answer]:
    answers = [Answer() for _ in requests]
    for each, answer in zip(requests, answers, strict=True):
        engine.submit(each, answer)
    return answers


def test_answers_are_what_they_would_have_been(engine: Engine) -> None:
    requests = [request(seed, BOUNDS[seed % len(BOUNDS)]) for seed in range(16)]
    alone = [(answer, answer.outcome()) for answer in ask(engine, requests)]
    tiers = {outcome.quality.tier for _, outcome in alone if outcome.quality.delta}
    assert len(tiers) > 2 and "full" in tiers
    draw = random.Random(0)
    answers = ask(engine, requests)
    budget = ROOMY
    while not engine.drain(draw.uniform(0, 0.05)):
        budget = need(engine, requests, draw.choice((1.0, 1.3, 2.0, 5.0)))
        engine.resize(budget)
        assert engine.stats().kv_bytes <= budget == engine.stats().kv_budget
    stats = engine.stats()
    assert stats.finished == 32 and not stats.failed
    assert stats.evictions > 1
    assert stats.kv_bytes == engine.fixed_bytes
    for each, answer, (before, outcome) in zip(requests, answers, alone, strict=True):
        found = answer.outcome()
        if found.quality.kind is not Kind.VERIFIED or not (each.bound and each.bound.epsilon):
            assert answer.ids == before.ids  # others are within their bounds, at other tiers
        assert found.finish is Finish.LENGTH and found.quality.kind is outcome.quality.kind
        if found.quality.kind is Kind.CALIBRATED:
            assert found.quality.tier == outcome.quality.tier
            assert found.quality.bound == pytest.approx(outcome.quality.bound, rel=1e-3)
        assert found.quality.bound <= (each.bound or EXACT).epsilon


def evict(engine: Engine, bound: QualityBound | None) -> tuple[Answer, int]:
    """Have a younger request with some tokens give back all that it has, and wait."""
    long = GenerationRequest(prompt=request(7, None).prompt * 4, max_new_tokens=100)
    requests = [long, request(9, bound, 200)]
    older, younger = Answer(), Answer()
    engine.submit(requests[0], older)
    number = engine.submit(requests[1], younger)
    assert younger.first.wait(60) and older.first.wait(60)
    engine.resize(need(engine, requests, 1.01))
    while engine.stats().waiting == 0:
        time.sleep(0.01)
    assert engine.stats().evictions == 1
    return younger, number


@pytest.mark.parametrize("bound", [None, EXACT, BOUNDS[-2]])
def test_one_that_has_enough_while_it_waits_has_its_answer(
    engine: Engine, bound: QualityBound | None
) -> None:
    younger, number = evict(engine, bound)
    made = len(younger.ids)
    engine.stop(number)
    outcome = younger.outcome()
    assert outcome.finish is Finish.STOP and outcome.new_tokens == made == len(younger.ids) > 0
    assert outcome.quality.delta == (bound.delta if bound else 0)
    assert outcome.quality.kv_bytes > 0


def test_one_that_goes_while_it_waits_is_forgotten(engine: Engine) -> None:
    younger, number = evict(engine, None)
    engine.cancel(number)
    assert younger.outcome().finish is Finish.CANCELLED
    assert engine.drain(60)
    assert engine.stats().kv_bytes == engine.fixed_bytes


def test_a_measurement_is_the_same_however_often_it_begins(engine: Engine) -> None:
    asked = [request(seed, None, 30) for seed in range(4)]

    def measure() -> list[list[float]]:
        found: Queue[Any] = Queue()
        for each in asked:
            engine.measure(each, lambda result: found.put(result), tier=0)
        draw = random.Random(1)
        while not engine.drain(draw.uniform(0, 0.02)):
            engine.resize(need(engine, asked, draw.choice((1.0, 1.5, 4.0))))
        measured = sorted((found.get(timeout=60) for _ in asked), key=lambda one: one.tokens)
        return [list(each.divergences) for each in measured]

    before = measure()
    while engine.stats().evictions < 12:
        for one, other in zip(measure(), before, strict=True):
            assert one == pytest.approx(other, abs=1e-5)
    engine.resize(ROOMY)


def test_a_budget_without_room_for_one_that_is_here_is_refused(engine: Engine) -> None:
    long = request(7, None, 300)
    answer = Answer()
    engine.submit(long, answer)
    with pytest.raises(InputError, match=r"give \d+ or more"):
        engine.resize(engine.fixed_bytes + 1000)
    assert engine.stats().kv_budget == ROOMY
    assert isinstance(answer.outcome(), Outcome)
    assert engine.drain(10)
    engine.resize(engine.fixed_bytes + 1000)
    assert engine.stats().kv_budget == engine.fixed_bytes + 1000
