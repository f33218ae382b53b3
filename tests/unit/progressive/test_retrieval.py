"""Answers over chunks: within the bound, whatever the tiers left away."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from lib.errors import InputError
from lib.progressive.bounds import Kind, Metric, QualityBound
from lib.progressive.retrieval import Context, answer

CHUNKS = [[number, number + 1, number + 2] for number in range(8)]
CONTEXT = Context(
    chunks=CHUNKS, relevance=[0, 5, 1, 1, 0, 9, 2, 0], question=[11, 12], opening=[15]
)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=16, n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.25,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def _full_answer(model: Any, tokens: int) -> list[int]:
    prompt = torch.tensor([CONTEXT.tokens(1)])
    text = model.generate(
        prompt, max_new_tokens=tokens, do_sample=False, attention_mask=torch.ones_like(prompt),
        pad_token_id=0,
    )  # fmt: skip
    return list(text[0, prompt.shape[1] :].tolist())


def test_a_share_keeps_the_most_relevant_in_their_order() -> None:
    assert CONTEXT.tokens(0.2) == [15, 1, 2, 3, 5, 6, 7, 11, 12]
    assert CONTEXT.tokens(0.5) == [15, *CHUNKS[1], *CHUNKS[2], *CHUNKS[5], *CHUNKS[6], 11, 12]
    assert CONTEXT.tokens(1) == [15, *(token for chunk in CHUNKS for token in chunk), 11, 12]


@settings(max_examples=25, deadline=None)
@given(epsilon=st.sampled_from([0.0, 1e-4, 1e-3, 1e-2, 0.1, 1.0]), tokens=st.integers(1, 10))
def test_the_mean_is_within_the_bound(model: Any, epsilon: float, tokens: int) -> None:
    found = answer(model, CONTEXT, QualityBound(epsilon=epsilon), max_new_tokens=tokens)
    assert len(found.tokens) == len(found.kl) == tokens
    assert found.mean_kl <= epsilon
    assert found.context_tokens == len(CONTEXT.tokens(found.share)) <= found.full_tokens
    assert found.drafted >= tokens
    if not epsilon:
        assert (found.share, found.kind) == (1, Kind.FULL)
        assert list(found.tokens) == _full_answer(model, tokens)


def test_exact_is_the_full_models_text(model: Any) -> None:
    bound = QualityBound(metric=Metric.EXACT)
    assert list(answer(model, CONTEXT, bound, max_new_tokens=10).tokens) == _full_answer(model, 10)


def test_a_lax_bound_takes_the_lowest_tier_and_an_end_ends(model: Any) -> None:
    bound = QualityBound(epsilon=100)
    found = answer(model, CONTEXT, bound, max_new_tokens=6)
    assert (found.share, found.escalations, found.kind) == (0.125, 0, Kind.VERIFIED)
    ended = answer(model, CONTEXT, bound, max_new_tokens=6, end_ids=frozenset({found.tokens[1]}))
    assert len(ended.tokens) <= 2


def test_bad_input_is_refused(model: Any) -> None:
    with pytest.raises(InputError, match="delta 0"):
        answer(model, CONTEXT, QualityBound(epsilon=1, delta=0.05), max_new_tokens=1)
    with pytest.raises(InputError, match="the last of them 1"):
        answer(model, CONTEXT, QualityBound(epsilon=1), max_new_tokens=1, shares=[0.5])
    with pytest.raises(InputError, match="as many of both"):
        Context(chunks=[[1]], relevance=[], question=[1])
