"""What the scheduler holds for a request covers what is there, at every moment of a step."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from lib.progressive import active
from lib.progressive.batch import Rows
from lib.progressive.bounds import Kind, Metric, QualityBound
from lib.progressive.calibration import KEYS, Calibration
from lib.progressive.engine import Engine
from lib.progressive.generation import GenerationRequest
from lib.progressive.ladder import make_ladder
from lib.progressive.served import ServedModel
from lib.progressive.verify import Scored
from tests.answers import Answer
from tests.tiny_models import served_llama

EXACT = QualityBound(metric=Metric.EXACT)
BOUNDS = (
    *(None, EXACT, QualityBound(epsilon=0.003), QualityBound(epsilon=0.1)),
    *(QualityBound(epsilon=epsilon, delta=0.05) for epsilon in (1e-9, 1.0)),
)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """One whose drafts are mostly rejected."""
    return served_llama(max_position_embeddings=900, initializer_range=0.35)


@pytest.fixture(scope="module")
def calibration(model: Any) -> Calibration:
    served = ServedModel(model)
    served.close()
    return Calibration(
        keys=dict.fromkeys(KEYS, "1"),
        ladder=make_ladder(served.shape).restrict("K3V2"),
        information=((1e-3, 1e-3),) * 2,
        scores=(1.0,) * 59,
        tokens=(200,) * 59,
    )


def requests(draw: random.Random) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            prompt=[draw.randrange(50) for _ in range(draw.randint(90, 630))],
            max_new_tokens=draw.randint(20, 110),
            bound=draw.choice(BOUNDS),
        )
        for _ in range(14)
    ]


@pytest.mark.parametrize("seed", (2, 3, 6))
def test_held_bytes_cover_those_that_are_there(
    model: Any, calibration: Calibration, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once climbs are made, once room is given for a step, and once its tokens are there, before
    any is taken back.
    """
    monkeypatch.setattr(active, "_SEEN", 8)
    monkeypatch.setattr(active, "_FEW", 0.95)  # climbs are asked for all the time
    above: dict[bool, list[int]] = {False: [], True: []}
    asked = requests(random.Random(seed))
    longest = max(len(each.prompt) + each.max_new_tokens for each in asked) + 17
    with Engine(model, kv_budget=2**24, calibration=calibration, prefix_bytes=0) as engine:
        engine.resize(engine.fixed_bytes + 2 * longest * engine.shape.token_bytes)
        runner = engine._runner
        run, climb = engine._served.run, runner._climb

        def look() -> None:
            accounts = runner.scheduler._running
            for number, each in runner.active.items():
                more = each.states.num_bytes - accounts[number].held
                above[each.kind is Kind.VERIFIED and each.tier < each.top].append(more)

        def climb_and_look() -> None:
            climb()
            look()

        def run_and_look(rows: Sequence[Rows]) -> list[Scored]:
            look()
            found = run(rows)
            look()
            return found

        monkeypatch.setattr(runner, "_climb", climb_and_look)
        monkeypatch.setattr(engine._served, "run", run_and_look)
        answers = [Answer() for _ in asked]
        for each, answer in zip(asked, answers, strict=True):
            engine.submit(each, answer)
        for answer in answers:
            answer.outcome()
        stats = engine.stats()
    assert stats.escalations > 3 and not stats.failed
    assert max(above[False]) <= 0
    assert max(above[True]) == 0, "drafts take no more than is held, and all of it now and then"
