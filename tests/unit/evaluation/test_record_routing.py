"""Routing recorded while a mixture answers: of every family alike, what its own router says."""

from pathlib import Path

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from lib.errors import InputError
from lib.evaluation.record_routing import record_routing
from lib.evaluation.route_traces import read_trace, write_trace
from lib.policy.experts.judge import judge

SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
}
MAKERS = {
    "qwen3": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **SMALL, moe_intermediate_size=8, num_experts=8, head_dim=8, mlp_only_layers=[0]
        )
    ),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=8)),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**SMALL, num_experts=8, head_dim=8)),
    "gpt-oss": lambda: GptOssForCausalLM(
        GptOssConfig(**SMALL, num_local_experts=8, head_dim=8, pad_token_id=0)
    ),
}


def make(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return MAKERS[family]().eval()


@pytest.mark.parametrize("family", MAKERS)
def test_turns_have_prompts_and_decode_steps_of_every_layer(family: str, tmp_path: Path) -> None:
    model = make(family)
    prompts = torch.randint(0, 64, (2, 5), generator=torch.Generator().manual_seed(1))
    trace = record_routing(model, prompts, new_tokens=6, name=family)
    layers = [1] if family == "qwen3" else [0, 1]
    assert list(trace.experts) == layers and set(trace.experts.values()) == {8}
    assert trace.decode_steps == 12 and set(trace.per_token.values()) == {2}
    for layer in layers:
        for turn in range(2):
            mine = [cell for cell in trace.cells if (cell.turn, cell.layer) == (turn, layer)]
            assert [cell.step for cell in mine] == list(range(11))
            assert [cell.decode for cell in mine] == [False] * 5 + [True] * 6
            assert all(len(set(cell.experts)) == 2 for cell in mine)
    again = record_routing(model, prompts, new_tokens=6, name=family)
    assert again == trace
    assert not any(module._forward_pre_hooks for module in model.modules())
    write_trace(trace, tmp_path / "t.csv.gz")
    verdict = judge(read_trace(tmp_path / "t.csv.gz"), 0.5)
    assert verdict.uses == 12 * 2 * len(layers)
    assert verdict.hit_rate("belady") >= verdict.hit_rate("ours")


def test_the_prompts_routing_is_the_routers_own() -> None:
    model = make("mixtral")
    prompts = torch.randint(0, 64, (1, 5), generator=torch.Generator().manual_seed(1))
    trace = record_routing(model, prompts, new_tokens=1)
    with torch.no_grad():
        logits = model(prompts, output_router_logits=True).router_logits
    for layer, logits_TE in enumerate(logits):
        top_TK = logits_TE.view(5, 8).topk(2, dim=-1).indices.tolist()
        mine = [cell for cell in trace.cells if cell.layer == layer and not cell.decode]
        assert [list(cell.experts) for cell in mine] == top_TK
        assert all(sum(cell.weights or ()) == pytest.approx(1, abs=1e-5) for cell in mine)
    (size,) = set(trace.expert_bytes.values())
    assert size == 4 * (2 * 8 * 16 + 16 * 8)


def test_a_dense_model_is_refused_by_name() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=16))
    with pytest.raises(InputError, match="GPT2LMHeadModel has no module experts"):
        record_routing(model, torch.zeros(1, 2, dtype=torch.long), new_tokens=1)
