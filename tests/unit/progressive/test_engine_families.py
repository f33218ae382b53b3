"""Decoders of many kinds behind one attention function, against their own generate."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from lib.errors import InputError
from lib.progressive.bounds import Metric, QualityBound
from lib.progressive.engine import Engine
from lib.progressive.generation import GenerationRequest
from tests.answers import Answer

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 320,
    "initializer_range": 0.3,
}
MIXED = {
    **SMALL,
    "sliding_window": 90,
    "layer_types": ["sliding_attention", "full_attention"],
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
}
GPT2 = {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 40, "n_positions": 320}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}


def build(name: str, options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    text = "TextConfig" if name.startswith("Gemma3") else "Config"
    config = getattr(transformers, name.replace("ForCausalLM", text))
    return getattr(transformers, name)(config(**options))


FAMILIES: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**GPT2, initializer_range=0.3)
    ),
    "mistral": lambda: build("MistralForCausalLM", {**SMALL, "sliding_window": 90}),
    "qwen3": lambda: build("Qwen3ForCausalLM", {**SMALL, "head_dim": 8}),
    "gemma2": lambda: build("Gemma2ForCausalLM", MIXED),
    "gemma3": lambda: build("Gemma3ForCausalLM", MIXED),
    "phi": lambda: build("PhiForCausalLM", SMALL),
    "opt": lambda: build(
        "OPTForCausalLM", {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 64, "init_std": 0.3}
    ),
    "qwen3 moe": lambda: build("Qwen3MoeForCausalLM", {**SMALL, **MOE}),
}


def prompt(tokens: int) -> list[int]:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(1, 40, (tokens,), generator=generator).tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_answers_as_by_itself(name: str) -> None:
    torch.manual_seed(0)
    model = FAMILIES[name]().eval()
    alone = copy.deepcopy(model)
    requests = [
        GenerationRequest(prompt=prompt(tokens), max_new_tokens=24, bound=bound)
        for tokens in (30, 230)
        for bound in (None, QualityBound(metric=Metric.EXACT))
    ]
    with Engine(model, kv_budget=2**24, prefix_bytes=0) as engine:
        answers = [Answer() for _ in requests]
        for request, answer in zip(requests, answers, strict=True):
            engine.submit(request, answer)
        for request, answer in zip(requests, answers, strict=True):
            answer.outcome()
            ids = torch.tensor([list(request.prompt)])
            with torch.no_grad():
                text = alone.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=24,
                    do_sample=False,
                    eos_token_id=None,
                )
            assert answer.ids == text[0, len(request.prompt) :].tolist()


@pytest.mark.parametrize(
    "make",
    [
        lambda: build(
            "GptOssForCausalLM",
            {**MIXED, "num_local_experts": 4},
        ),
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ),
        lambda: build(
            "Phi3ForCausalLM",
            {
                **SMALL,
                "original_max_position_embeddings": 64,
                "pad_token_id": 0,
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 10000.0,
                    "short_factor": [1.0] * 8,
                    "long_factor": [4.0] * 8,
                    "original_max_position_embeddings": 64,
                },
            },
        ),
        lambda: transformers.MambaForCausalLM(
            transformers.MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=40)
        ),
    ],
)
def test_what_cant_be_served_is_refused_by_name(make: Callable[[], Any]) -> None:
    model = make().eval()
    with pytest.raises(InputError, match="can't be served|longrope"):
        Engine(model, kv_budget=2**24)
