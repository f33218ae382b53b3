"""Checkpoints that have one tensor per expert, of models that hold all experts in one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_mixtral
from torch import nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from lib.checkpoint.source import open_checkpoint
from lib.errors import InputError
from lib.tiering import attach, empty_weights, plan

IDS = torch.arange(12).reshape(2, 6)


def qwen() -> nn.Module:
    """Twelve experts: their names sort otherwise than their numbers."""
    torch.manual_seed(0)
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            hidden_size=16,
            intermediate_size=32,
            moe_intermediate_size=8,
            shared_expert_intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_experts=12,
            num_experts_per_tok=2,
            vocab_size=40,
        )
    )


def deepseek() -> nn.Module:
    """Its router has a bias that is a persistent buffer."""
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(
        DeepseekV3Config(
            hidden_size=16,
            intermediate_size=24,
            moe_intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            n_routed_experts=8,
            n_group=2,
            topk_group=1,
            num_experts_per_tok=2,
            vocab_size=40,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=8,
            first_k_dense_replace=1,
        )
    )
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias
    bias.copy_(torch.linspace(-0.5, 0.5, len(bias)))
    return model


@pytest.mark.parametrize("build", [tiny_mixtral, qwen, deepseek])
@pytest.mark.parametrize("tier", ["HBM", "SSD"])
def test_a_saved_mixture_model_runs_from_its_checkpoint(
    build: Callable[[], nn.Module], tier: str, tmp_path: Path
) -> None:
    model = build().eval()
    model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    with empty_weights():
        empty = type(model)(model.config).eval()
    source = open_checkpoint(empty, tmp_path / "saved")
    for name, weights in model.state_dict().items():
        assert torch.equal(source.read(name), weights), name
        if weights.dim() == 3:
            assert torch.equal(source.read(name, 1, 3), weights[1:3])
    with torch.no_grad():
        expected = model(IDS).logits
        smallest = plan(empty, budget={"HBM": None, "SSD": None}).smallest_hbm_bytes
        budget = {"HBM": None if tier == "HBM" else smallest, "SSD": None}
        with attach(
            empty, budget=budget, weights=tmp_path / "saved", spill_dir=tmp_path / "spill"
        ) as runtime:
            assert torch.equal(empty(IDS).logits, expected)
            assert (runtime.stats().bytes_moved > 0) == (tier == "SSD")


def test_an_expert_that_is_missing_or_of_another_shape_is_named(tmp_path: Path) -> None:
    model = tiny_mixtral()
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    for damaged, message in (
        ({**tensors, name: torch.ones(16, 8)}, "slices of tensor .* differ in shape"),
        (
            {key: value for key, value in tensors.items() if key != name},
            r"experts\.down_proj' is \(4, 32, 32\) in the model and \(3, 32, 32\)",
        ),
    ):
        save_file(damaged, path)
        with empty_weights():
            empty = type(model)(model.config)
        with pytest.raises(InputError, match=message):
            attach(empty, budget={"HBM": None}, weights=tmp_path)
