"""Checkpoints that a model would compute wrong numbers with are refused by name."""

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama, tiny_mixtral
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPTextConfig,
    CLIPTextModel,
    GPTJConfig,
    GPTNeoConfig,
)

from lib.errors import InputError
from lib.tiering import attach, empty_weights, load

Tensors = dict[str, Tensor]
IDS = torch.arange(12).reshape(2, 6)


def by_hand(folder: Path) -> nn.Module:
    with empty_weights():
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()


def each_matrix(change: Callable[[str, Tensor], Tensors]) -> Callable[[Tensors], Tensors]:
    """Make a checkpoint's matrices something else, what it adds included."""

    def pack(state: Tensors) -> Tensors:
        packed: Tensors = {}
        for name, value in state.items():
            packed |= change(name, value) if re.search("proj|experts", name) else {name: value}
        return packed

    return pack


def codes(dtype: torch.dtype) -> Callable[[str, Tensor], Tensors]:
    def change(name: str, value: Tensor) -> Tensors:
        return {name: (value / value.abs().max() * 100).to(dtype)}

    return change


def with_scale(ending: str, dtype: torch.dtype) -> Callable[[str, Tensor], Tensors]:
    """Scales beside the weight, or under its name with an ending."""

    def change(name: str, value: Tensor) -> Tensors:
        module = name.removesuffix("weight")
        return {name: (value * 2).to(dtype), module + ending: torch.tensor([0.5])}

    return change


def gptq(name: str, value: Tensor) -> Tensors:
    module = name.removesuffix("weight")
    rows, columns = value.shape
    return {
        f"{module}qweight": torch.zeros(columns // 8, rows, dtype=torch.int32),
        f"{module}qzeros": torch.zeros(1, rows // 8, dtype=torch.int32),
        f"{module}scales": torch.ones(1, rows, dtype=torch.float16),
        f"{module}g_idx": torch.zeros(columns, dtype=torch.int32),
    }


def packed_int4(name: str, value: Tensor) -> Tensors:
    """As compressed-tensors packs."""
    return {
        f"{name}_packed": torch.zeros(value.shape[0], value.shape[1] // 8, dtype=torch.int32),
        f"{name}_scale": torch.ones(value.shape[0], 1),
        f"{name}_shape": torch.tensor(value.shape),
    }


def bitsandbytes_4bit(name: str, value: Tensor) -> Tensors:
    return {
        name: torch.zeros(value.numel() // 2, 1, dtype=torch.uint8),
        f"{name}.absmax": torch.ones(value.numel() // 64),
        f"{name}.quant_map": torch.ones(16),
        f"{name}.quant_state.bitsandbytes__nf4": torch.zeros(80, dtype=torch.uint8),
    }


def mxfp4(name: str, value: Tensor) -> Tensors:
    return {
        f"{name}_blocks": torch.zeros(*value.shape, dtype=torch.uint8),
        f"{name}_scales": torch.zeros(value.shape[0], dtype=torch.uint8),
    }


PACKED: dict[str, tuple[dict[str, Any], Callable[[str, Tensor], Tensors]]] = {
    "fp8": ({"quant_method": "fp8"}, with_scale("weight_scale_inv", torch.float8_e4m3fn)),
    "compressed-tensors": (
        {"quant_method": "compressed-tensors"},
        with_scale("weight_scale", torch.float8_e4m3fn),
    ),
    "pack-quantized": ({"format": "pack-quantized"}, packed_int4),
    "bitsandbytes": ({"quant_method": "bitsandbytes"}, with_scale("SCB", torch.int8)),
    "bitsandbytes 4 bits": ({"quant_method": "bitsandbytes"}, bitsandbytes_4bit),
    "gptq": ({"quant_method": "gptq", "bits": 4}, gptq),
    "awq": ({"quant_method": "awq", "bits": 4}, gptq),
    "mxfp4": ({"quant_method": "mxfp4"}, mxfp4),
    **{
        f"plain {dtype}": ({"quant_method": "mine"}, codes(dtype))
        for dtype in (
            torch.int8,
            torch.uint8,
            torch.int16,
            torch.int32,
            torch.int64,
            torch.float8_e4m3fn,
            torch.float8_e5m2,
        )
    },
    "rounded floats with a scale beside": ({}, with_scale("s", torch.float16)),
    "rounded floats with a scale below": ({}, with_scale("weight_mul", torch.float32)),
}


@pytest.mark.parametrize(
    ("kind", "said", "build"),
    [
        *((kind, said, tiny_llama) for kind in PACKED for said in (True, False)),
        *((kind, False, tiny_mixtral) for kind in ("fp8", "bitsandbytes", "gptq", "mxfp4")),
    ],
)
def test_a_quantized_checkpoint_is_refused_by_name(
    kind: str, said: bool, build: Callable[[], Any], tmp_path: Path
) -> None:
    config, change = PACKED[kind]
    build().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    packed = each_matrix(change)(load_file(path))
    save_file(packed, path, metadata={"format": "pt"})
    if said and config:
        document = json.loads((tmp_path / "config.json").read_text())
        document["quantization_config"] = config
        (tmp_path / "config.json").write_text(json.dumps(document))
        problem = f"is quantized .quantization_config in its config.json: {[*config.values()][0]}"
    else:
        problem = r"is quantized: .*\(\d+: model\.layers\.0\.[\w.]+(proj|experts)"
    with pytest.raises(InputError, match=problem):
        load(tmp_path)
    for weights in (tmp_path, path):
        empty = by_hand(tmp_path)
        with pytest.raises(InputError, match=problem):
            attach(empty, budget={"HBM": None}, weights=weights)
        assert all(parameter.is_meta for parameter in empty.parameters())


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float8_e4m3fn])
@pytest.mark.parametrize("name", ["0.weight", "1.running_mean"])
def test_codes_are_refused_for_any_module(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).eval()

    state = build().state_dict()
    save_file({**state, name: state[name].to(dtype)}, tmp_path / "model.safetensors")
    with empty_weights():
        empty = build()
    with pytest.raises(InputError, match=f"codes in place of .*1: {name} "):
        attach(empty, budget={"HBM": None}, weights=tmp_path)


SPARE = {
    "a head": {"score.weight": torch.ones(2, 32)},
    "a bias": {"model.layers.0.mlp.up_proj.bias": torch.ones(48)},
    "another layer": {"model.layers.2.mlp.up_proj.weight": torch.ones(48, 32)},
    "a tensor at the top": {"logit_scale": torch.ones(())},
}


@pytest.mark.parametrize("kind", SPARE)
def test_tensors_that_transformers_leaves_out_are_left_out_with_a_warning(
    kind: str, tmp_path: Path
) -> None:
    tiny_llama().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({**load_file(path), **SPARE[kind]}, path, metadata={"format": "pt"})
    want = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=rf"1: {[*SPARE[kind]][0]} float32"):
        model = load(tmp_path)
    with (
        pytest.warns(UserWarning, match="tensors that the model doesn't take"),
        torch.no_grad(),
        attach(model, budget={"HBM": None}, weights=tmp_path),
    ):
        assert torch.equal(model(IDS).logits, want(IDS).logits)


def test_what_older_checkpoints_hold_is_left_out_without_a_word(tmp_path: Path) -> None:
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48}
    for model, spare in (
        (tiny_llama(), {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
        (
            CLIPTextModel(
                CLIPTextConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, eos_token_id=39)
            ),
            {"text_model.embeddings.position_ids": torch.arange(77)[None]},
        ),
    ):
        model.save_pretrained(tmp_path)
        path = tmp_path / "model.safetensors"
        save_file({**load_file(path), **spare}, path, metadata={"format": "pt"})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            attach(load(tmp_path), budget={"HBM": None}, weights=tmp_path).detach()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("h.0.attn.bias", torch.uint8), ("h.0.attn.attention.masked_bias", torch.float32)],
)
def test_masks_that_older_checkpoints_have_are_left_out(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    config: Any = GPTNeoConfig(
        hidden_size=16, num_layers=1, num_heads=2, attention_types=[[["global"], 1]],
        vocab_size=50, max_position_embeddings=16,
    )  # fmt: skip
    if dtype is torch.uint8:
        config = GPTJConfig(
            n_embd=16, n_layer=1, n_head=2, rotary_dim=4, vocab_size=50, n_positions=16
        )
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    mask = {f"transformer.{name}": torch.ones(1, 1, 16, 16).to(dtype)}
    save_file(load_file(file) | mask, file, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="left out"):
        empty = load(tmp_path)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        expected = model(ids).logits
        with attach(empty, budget={"HBM": None}, weights=tmp_path):
            assert torch.equal(empty(ids).logits, expected)
