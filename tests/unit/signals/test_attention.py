from typing import Any

import pytest
import torch
from signal_models import token_batches, toy_lm
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from lib.errors import InputError
from lib.signals import attention_fim_trace

SIZES: dict[str, Any] = {"vocab_size": 16, "bos_token_id": 0, "eos_token_id": 0}


def gpt2(**options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=3, n_embd=12, n_positions=128, **SIZES, **options)
    return GPT2LMHeadModel(config)


def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        **SIZES,
    )
    return LlamaForCausalLM(config)


def look_everywhere_alike(model: PreTrainedModel) -> PreTrainedModel:
    """Zero queries and keys: all attention logits are zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("c_attn", "q_proj", "k_proj")):
                parameter.zero_()
    return model


@pytest.mark.parametrize(
    ("model", "blocks", "heads"),
    [
        (gpt2(), ["transformer.h.0.attn", "transformer.h.1.attn"], 3),
        (llama(), ["model.layers.0.self_attn"], 4),
    ],
    ids=["gpt2", "llama"],
)
def test_uniform_causal_attention_over_128_positions(
    model: PreTrainedModel, blocks: list[str], heads: int
) -> None:
    ids = torch.randint(0, 16, (2, 128), generator=torch.Generator().manual_seed(0))
    traces = attention_fim_trace(look_everywhere_alike(model), [ids])
    assert list(traces) == blocks
    exact = 1 - sum(1 / position for position in range(1, 129)) / 128
    for values in traces.values():
        assert values == pytest.approx([exact] * heads, abs=1e-6)
        assert [round(value, 4) for value in values] == [0.9576] * heads


def test_a_single_key_carries_no_information() -> None:
    traces = attention_fim_trace(gpt2(), [torch.zeros(4, 1, dtype=torch.long)])
    assert all(abs(value) < 1e-6 for values in traces.values() for value in values)


def test_the_mean_is_over_all_queries_of_all_batches() -> None:
    model = gpt2()
    short, long = torch.randint(0, 16, (2, 4)), torch.randint(0, 16, (1, 12))
    both = attention_fim_trace(model, [short, long])
    one, two = attention_fim_trace(model, [short]), attention_fim_trace(model, [long])
    for name, values in both.items():
        expected = [(8 * a + 12 * b) / 20 for a, b in zip(one[name], two[name], strict=True)]
        assert values == pytest.approx(expected)


def test_it_equals_the_attentions_that_the_model_gives_out() -> None:
    model = gpt2()
    ids = torch.randint(0, 16, (1, 20))
    traces = attention_fim_trace(model, [ids])
    model.set_attn_implementation("eager")
    attentions = model.eval()(input_ids=ids, output_attentions=True).attentions
    for values, attention in zip(traces.values(), attentions, strict=True):
        expected = (1 - attention.square().sum(-1)).mean((0, 2))
        assert values == pytest.approx(expected.tolist(), abs=1e-6)


def test_the_model_is_left_as_it_was() -> None:
    model = gpt2(attn_pdrop=0.5).train()
    model.set_attn_implementation("sdpa")
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    ids = torch.randint(0, 16, (1, 8))
    first, second = (attention_fim_trace(model, [ids]) for _ in range(2))
    assert first == second, "dropout was on"
    assert model.config._attn_implementation == "sdpa"
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())


def test_models_without_visible_attention_are_refused() -> None:
    with pytest.raises(InputError, match="ToyLM has no attention block"):
        attention_fim_trace(toy_lm(), token_batches())

    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.Linear(2, 2)

    with pytest.raises(InputError, match="not a Hugging Face model"):
        attention_fim_trace(Custom(), token_batches())


def test_attention_that_returns_no_probabilities_is_refused() -> None:
    model = gpt2()
    attention = model.transformer.h[1].attn
    attention.register_forward_hook(lambda module, args, output: (output[0], None))
    with pytest.raises(InputError, match=r"'transformer.h.1.attn' returns no probabilities"):
        attention_fim_trace(model, [torch.zeros(1, 4, dtype=torch.long)])
    assert model.config._attn_implementation == "sdpa"


def test_no_text_is_refused() -> None:
    with pytest.raises(InputError, match="at least one batch"):
        attention_fim_trace(gpt2(), [])
