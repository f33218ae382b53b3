"""An endpoint over a model of 258 byte tokens: after ``<assistant>`` it writes the alphabet."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from transformers import LlamaConfig, LlamaForCausalLM

from lib.serving.app import make_app
from lib.serving.settings import ModelCard, Settings
from tests.integration.test_collect_fisher import byte_tokenizer
from tests.plain_engine import PlainEngine

ANSWER = "abcdefghijklmnopqrstuvwxyz~\u00e9!"
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
Endpoint = Callable[..., TestClient]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def model(tokenizer: Any) -> LlamaForCausalLM:
    """Each token says which is the next; of the others, all are as likely."""
    config = LlamaConfig(
        hidden_size=260,
        intermediate_size=2,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=258,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    ids = [*tokenizer(f">{ANSWER}")["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(258, 260))
        model.lm_head.weight.zero_()
        for token, following in zip(ids, ids[1:], strict=False):
            model.lm_head.weight[following, token] = 0.5
    return model


@pytest.fixture
def engine(model: LlamaForCausalLM) -> Iterator[PlainEngine]:
    engine = PlainEngine(model)
    yield engine
    engine.close()


@pytest.fixture
def endpoint(engine: PlainEngine, tokenizer: Any) -> Endpoint:
    def start(**settings: Any) -> TestClient:
        stops = frozenset({tokenizer.eos_token_id})
        card = ModelCard(name="tiny", vocab_size=258, stop_ids=stops)
        made = make_app(engine, tokenizer, Settings(model=card, **settings))
        return TestClient(made, raise_server_exceptions=False)

    return start


@pytest.fixture
def client(endpoint: Endpoint) -> TestClient:
    return endpoint()
