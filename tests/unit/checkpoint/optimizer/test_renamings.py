"""Saved names and the model's: wrappers, other code bases, experts saved one by one."""

import re
from pathlib import Path

import pytest
import torch
from saved_states import MODELS, train
from torch import Tensor, nn

from lib.blocks import unique_parameters
from lib.checkpoint.optimizer import SavedMoment
from lib.checkpoint.optimizer.names import match_names
from lib.errors import InputError


def moment(values: Tensor, step: int = 3) -> SavedMoment:
    return SavedMoment(shape=values.shape, steps=(step,), beta2=0.95, read=lambda: values)


def moments_of(model: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {name: torch.rand(each.shape) for name, each in unique_parameters(model).items()}


def check(model: nn.Module, saved: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    named = {name: moment(values) for name, values in saved.items()}
    found = match_names(model, named, path="state")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].read(), expected[name]) for name in expected)


@pytest.mark.parametrize(
    "name",
    ["module.{}", "_orig_mod.{}", "module._orig_mod.{}", "_fsdp_wrapped_module.{}"],
)
def test_wrappers_are_taken_off(name: str) -> None:
    model = MODELS["llama"]()
    expected = moments_of(model)
    check(model, {name.format(own): values for own, values in expected.items()}, expected)
    inner = {
        own.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn."): values
        for own, values in expected.items()
    }
    check(model, inner, expected)


TITAN = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "q_proj": "attention.wq", "k_proj": "attention.wk", "v_proj": "attention.wv",
    "o_proj": "attention.wo", "self_attn.": "",
    "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2", "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm", "model.": "", "lm_head": "output",
}  # fmt: skip
OLMO_CORE = {
    "model.embed_tokens.weight": "embeddings.weight", "lm_head.": "lm_head.w_out.",
    "model.norm": "lm_head.norm", "model.layers": "blocks", "self_attn.": "attention.",
    "q_proj": "w_q", "k_proj": "w_k", "v_proj": "w_v", "o_proj": "w_out",
    "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2", "input_layernorm": "attention_norm",
    "post_attention_layernorm": "feed_forward_norm",
}  # fmt: skip


def renamed(name: str, table: dict[str, str]) -> str:
    for ours, theirs in table.items():
        name = name.replace(ours, theirs)
    return name


def pair_rotary(values: Tensor, heads: int) -> Tensor:
    """torchtitan's order of the rows of queries and keys: Llama3StateDictAdapter.from_hf."""
    rows, columns = values.shape
    halves = values.view(heads, 2, rows // heads // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns)


@pytest.mark.parametrize("linear", ["", "qkv_linear."])
def test_torchtitans_llama(linear: str) -> None:
    model = MODELS["llama"]()
    expected = moments_of(model)
    saved = {}
    for name, values in expected.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            values = pair_rotary(values, 4 if "q_proj" in name else 2)
        title = renamed(name, TITAN)
        saved[re.sub(r"attention\.w([qkv])\.", rf"attention.{linear}w\1.", title)] = values
    check(model, saved, expected)


def test_olmo_cores_llama() -> None:
    model = MODELS["llama"]()
    expected = moments_of(model)
    saved = {renamed(name, OLMO_CORE): values for name, values in expected.items()}
    assert "blocks.1.attention.w_q.weight" in saved and "lm_head.norm.weight" in saved
    check(model, saved, expected)


def test_olmo2_has_its_norms_after() -> None:
    from transformers import Olmo2Config, Olmo2ForCausalLM

    config = Olmo2Config(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=40,
    )  # fmt: skip
    model = Olmo2ForCausalLM(config)
    expected = moments_of(model)
    table = {
        **OLMO_CORE, "post_attention_layernorm": "attention_norm",
        "post_feedforward_layernorm": "feed_forward_norm",
    }  # fmt: skip
    del table["input_layernorm"]
    saved = {renamed(name, table): values for name, values in expected.items()}
    assert "blocks.0.attention.q_norm.weight" in saved
    check(model, saved, expected)


def test_experts_that_were_saved_one_by_one_keep_their_steps() -> None:
    model, _ = train("mixtral", steps=0)
    expected = moments_of(model)
    saved: dict[str, SavedMoment] = {}
    for name, values in expected.items():
        layer = name.rpartition(".mlp.")[0]
        old = f"{layer}.block_sparse_moe.experts"
        if name.endswith("gate_up_proj"):
            for number, expert in enumerate(values):
                gate, up = expert.chunk(2)
                saved[f"{old}.{number}.w1.weight"] = moment(gate, 3 + number)
                saved[f"{old}.{number}.w3.weight"] = moment(up, 3 + number)
        elif name.endswith("experts.down_proj"):
            for number, expert in enumerate(values):
                saved[f"{old}.{number}.w2.weight"] = moment(expert, 3 + number)
        else:
            saved[name.replace(".mlp.gate.", ".block_sparse_moe.gate.")] = moment(values, 9)
    found = match_names(model, saved, path="state")
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        packed = "experts" in name
        steps = (3, 4, 5, 6) if packed else (9,)
        assert found[name].steps == steps
        assert torch.equal(found[name].read(), values)
        rows = values if packed else values[None]
        corrections = [1 - 0.95**step for step in steps]
        by_hand = [row / each for row, each in zip(rows, corrections, strict=True)]
        assert torch.allclose(found[name].corrected(), torch.stack(by_hand).view(values.shape))


def test_names_and_shapes_of_another_model_are_refused(tmp_path: Path) -> None:
    model = MODELS["gpt2"]()
    expected = moments_of(model)
    strange = {f"decoder.{number}": values for number, values in enumerate(expected.values())}
    with pytest.raises(InputError, match=r"no parameter 'decoder.0'; it has decoder.0, decoder.1"):
        check(model, strange, expected)
    wrong = {**expected, "transformer.wte.weight": torch.rand(41, 16)}
    with pytest.raises(InputError, match=r"'transformer.wte.weight' is \(41, 16\), in the model"):
        check(model, wrong, expected)
    twice = {**expected, "lm_head.weight": expected["transformer.wte.weight"]}
    with pytest.raises(InputError, match="which are one weight in the model"):
        check(model, twice, expected)


def test_a_tied_weight_may_have_either_name() -> None:
    model = MODELS["gpt2"]()
    expected = moments_of(model)
    saved = dict(expected)
    saved["lm_head.weight"] = saved.pop("transformer.wte.weight")
    check(model, saved, expected)
