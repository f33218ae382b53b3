"""Loads on an engine: what is counted of a load of more requests than fit."""

from typing import Any

import pytest

from lib.errors import InputError
from lib.progressive.engine import Engine
from lib.progressive.generation import GenerationRequest
from scripts.experiments.progressive.loads import saturate
from tests.tiny_models import served_llama


@pytest.fixture(scope="module")
def model() -> Any:
    return served_llama(max_position_embeddings=300)


def test_what_fills_up_is_none_of_the_load(model: Any) -> None:
    requests = [
        GenerationRequest(prompt=[each % 50] * 40, max_new_tokens=30 + each) for each in range(12)
    ]
    with Engine(model, kv_budget=2**24, prefix_bytes=0) as engine:
        engine.resize(engine.fixed_bytes + 3 * 84 * engine.shape.token_bytes)
        found = saturate(engine, requests)
        assert found.tokens[0] == 0 < sum(found.tokens) < sum(range(30, 42))
        assert 2 <= found.concurrency <= 5
        engine.resize(2**24)
        with pytest.raises(InputError, match="give more"):
            saturate(engine, requests[:2])
