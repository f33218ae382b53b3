"""load(folder) builds what transformers' from_pretrained(folder) builds, without the weights."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import tiny_gpt2, tiny_llama, tiny_mixtral
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from lib.blocks import partition_model
from lib.errors import InputError
from lib.tiering import attach, empty_weights, load

IDS = torch.arange(1, 13).reshape(2, 6)
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 40,
}
HALVED: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 40,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": 2,
}
SEEN: dict[str, Any] = {"image_size": 16, "patch_size": 8, "num_channels": 3}


def build(name: str, config: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    return model_class(model_class.config_class(**config))


def tied_llama() -> Any:
    return build("LlamaForCausalLM", {**SMALL, "tie_word_embeddings": True})


def t5() -> Any:
    return build(
        "T5ForConditionalGeneration",
        {
            "vocab_size": 40,
            "d_model": 32,
            "d_ff": 64,
            "d_kv": 8,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
    )


def deepseek() -> Any:
    """Its router's bias is a persistent buffer that transformers keeps in fp32."""
    model = build(
        "DeepseekV3ForCausalLM",
        {
            **SMALL,
            "moe_intermediate_size": 8,
            "n_routed_experts": 8,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "first_k_dense_replace": 1,
        },
    )
    model.model.layers[1].mlp.gate.e_score_correction_bias.copy_(torch.linspace(-1, 1, 8))
    return model


def whisper() -> Any:
    return build(
        "WhisperForConditionalGeneration",
        {**HALVED, "num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 32},
    )


def clip() -> Any:
    parts = {key: SMALL[key] for key in SMALL if key != "vocab_size"}
    return build(
        "CLIPModel",
        {
            "text_config": {**SMALL, "projection_dim": 16, "max_position_embeddings": 32},
            "vision_config": {**parts, **SEEN, "projection_dim": 16},
            "projection_dim": 16,
        },
    )


def gemma3() -> Any:
    parts = {key: SMALL[key] for key in SMALL if key != "vocab_size"}
    return build(
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {
                **SMALL,
                "head_dim": 8,
                "num_key_value_heads": 2,
                "max_position_embeddings": 64,
                "sliding_window": 4,
            },
            "vision_config": {**parts, **SEEN},
            "mm_tokens_per_image": 4,
        },
    )


def blocks(model: nn.Module) -> list[str]:
    return [block.name for block in partition_model(model)]


def qwen3_5() -> Any:
    """Its language model alone is what AutoModelForCausalLM gives."""
    return build(
        "Qwen3_5ForConditionalGeneration",
        {
            "text_config": {
                **SMALL,
                "num_hidden_layers": 4,
                "head_dim": 8,
                "num_key_value_heads": 2,
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 2,
                "linear_key_head_dim": 8,
                "linear_value_head_dim": 8,
                "eos_token_id": 2,
            },
            "vision_config": {
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 2,
                "out_hidden_size": 32,
                "patch_size": 8,
            },
        },
    )


def words(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


def hidden(model: Any) -> Tensor:
    return model(input_ids=IDS).last_hidden_state


def both(model: Any) -> Tensor:
    return model(input_ids=IDS, decoder_input_ids=IDS).logits


def heard(model: Any) -> Tensor:
    sound = torch.linspace(-1, 1, 2 * 8 * 16, dtype=model.dtype).reshape(2, 8, 16)
    return model(input_features=sound, decoder_input_ids=IDS).logits


def seen(model: Any) -> Tensor:
    image = torch.linspace(-1, 1, 2 * 3 * 16 * 16, dtype=model.dtype).reshape(2, 3, 16, 16)
    if hasattr(model, "logit_scale"):
        return model(input_ids=IDS, pixel_values=image).logits_per_text
    return model(pixel_values=image).logits


MODELS: dict[str, tuple[Callable[[], Any], Callable[[Any], Tensor]]] = {
    "llama": (tiny_llama, words),
    "tied llama": (tied_llama, words),
    "gpt2": (tiny_gpt2, words),
    "mixtral": (tiny_mixtral, words),
    "deepseek": (deepseek, words),
    "gemma3": (gemma3, words),
    "qwen3.5": (qwen3_5, words),
    "t5": (t5, both),
    "bart": (lambda: build("BartForConditionalGeneration", HALVED), both),
    "whisper": (whisper, heard),
    "bert": (lambda: build("BertForMaskedLM", SMALL), words),
    "bert without head": (lambda: build("BertModel", SMALL), hidden),
    "deberta": (
        lambda: build(
            "DebertaV2ForMaskedLM", {**SMALL, "relative_attention": True, "pos_att_type": ["c2p"]}
        ),
        words,
    ),
    "mamba": (
        lambda: build("MambaForCausalLM", {**SMALL, "state_size": 4, "time_step_rank": 4}),
        words,
    ),
    "clip": (clip, seen),
    "vit": (
        lambda: build("ViTForImageClassification", {**SMALL, **SEEN, "num_labels": 3}),
        seen,
    ),
    "resnet": (
        lambda: build(
            "ResNetForImageClassification",
            {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 3},
        ),
        seen,
    ),
}


def tied_names(model: nn.Module) -> set[frozenset[str]]:
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}


def described(model: Any) -> dict[str, Any]:
    """Return all but the values of the weights."""
    state = model.state_dict(keep_vars=True)
    settings = getattr(model, "generation_config", None)
    return {
        "class": type(model),
        "dtypes": {name: (value.dtype, value.requires_grad) for name, value in state.items()},
        "buffers": {name: value.dtype for name, value in model.named_buffers()},
        "tied": tied_names(model),
        "modes": {name: module.training for name, module in model.named_modules()},
        "config": {**model.config.to_dict(), "transformers_version": None},
        "attention": model.config._attn_implementation,
        "generation": None if settings is None else settings.to_dict(),
    }


def same_buffers(first: nn.Module, second: nn.Module) -> bool:
    """Compare the buffers that are in no checkpoint, such as rotary frequencies."""
    saved = first.state_dict().keys()
    others = dict(second.named_buffers())
    return all(
        torch.equal(value, others[name])
        for name, value in first.named_buffers()
        if name not in saved
    )


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float16) for name in MODELS),
        *((name, torch.float32) for name in ("tied llama", "t5", "mixtral", "gemma3")),
        *((name, torch.bfloat16) for name in ("gpt2", "t5", "deepseek", "bert")),
    ],
)
def test_a_loaded_model_is_from_pretrained_s_bit_for_bit(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    make, run = MODELS[name]
    saved = make().to(dtype)
    saved.save_pretrained(tmp_path / "saved")
    want = type(saved).from_pretrained(tmp_path / "saved")
    empty = load(tmp_path / "saved")
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert described(empty) == described(want)
    assert same_buffers(empty, want)
    with torch.no_grad():
        expected = run(want)
        with attach(empty, budget={"HBM": None}, weights=tmp_path / "saved"):
            assert torch.equal(run(empty), expected)
        tiers = {name: "HBM" if index % 2 else "SSD" for index, name in enumerate(blocks(empty))}
        with attach(empty, tiers, weights=tmp_path / "saved") as runtime:
            assert torch.equal(run(empty), expected)
            assert runtime.stats().bytes_moved > 0


GENERATING = ["tied llama", "gpt2", "t5", "bart"]


@pytest.mark.parametrize("where", ["generation_config.json", "config.json", "nowhere"])
@pytest.mark.parametrize("name", GENERATING)
def test_generate_goes_by_the_folder_s_settings(name: str, where: str, tmp_path: Path) -> None:
    saved = MODELS[name][0]()
    saved.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    settings = {"eos_token_id": list(range(20)), "pad_token_id": 0, "no_repeat_ngram_size": 2}
    if where == "config.json":
        change_config(tmp_path, **settings)
    elif where == "generation_config.json":
        (tmp_path / where).write_text(json.dumps({**settings, "decoder_start_token_id": 1}))
    want = type(saved).from_pretrained(tmp_path)
    expected = want.generate(IDS, max_new_tokens=12)
    model = load(tmp_path)
    assert model.generation_config.to_dict() == want.generation_config.to_dict()
    with attach(model, budget={"HBM": None}, weights=tmp_path):
        assert torch.equal(model.generate(IDS, max_new_tokens=12), expected)


def test_generation_settings_that_a_model_built_by_hand_lacks_are_named(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    with pytest.warns(UserWarning, match="sets eos_token_id, and the model doesn't"):
        attach(by_hand(tmp_path), budget={"HBM": None}, weights=tmp_path).detach()
    chosen = by_hand(tmp_path)
    chosen.generation_config.eos_token_id = 7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model in (chosen, load(tmp_path)):
            attach(model, budget={"HBM": None}, weights=tmp_path).detach()


def by_hand(folder: Path) -> Any:
    with empty_weights():
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("shard_size", ["5GB", "5KB"])
@pytest.mark.parametrize("last", [torch.float32, torch.float16])
@pytest.mark.parametrize("first", [torch.bfloat16, torch.float32])
def test_without_a_dtype_in_the_config_the_checkpoint_s_first_one_holds(
    first: torch.dtype, last: torch.dtype, shard_size: str, tmp_path: Path
) -> None:
    saved = tiny_llama().to(first)
    saved.model.norm.to(last)
    saved.save_pretrained(tmp_path, max_shard_size=shard_size)
    change_config(tmp_path, dtype=None)
    want = AutoModelForCausalLM.from_pretrained(tmp_path)
    model = load(tmp_path)
    assert described(model) == described(want)
    with torch.no_grad(), attach(model, budget={"HBM": None}, weights=tmp_path):
        assert torch.equal(words(model), words(want))


@pytest.mark.parametrize("given", ["float32", torch.float16, torch.bfloat16])
def test_a_dtype_that_is_asked_for_is_from_pretrained_s(
    given: str | torch.dtype, tmp_path: Path
) -> None:
    t5().to(torch.bfloat16).save_pretrained(tmp_path)
    want = type(t5()).from_pretrained(tmp_path, dtype=given)
    model = load(tmp_path, dtype=given)
    assert described(model) == described(want)
    with torch.no_grad(), attach(model, budget={"HBM": None}, weights=tmp_path):
        assert torch.equal(both(model), both(want))


def test_a_model_built_in_another_dtype_for_want_of_one_in_the_config_is_warned_of(
    tmp_path: Path,
) -> None:
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path)
    change_config(tmp_path, dtype=None)
    with pytest.warns(UserWarning, match=r"built in torch\.float32.* has torch\.bfloat16"):
        attach(by_hand(tmp_path), budget={"HBM": None}, weights=tmp_path).detach()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [t5, deepseek])
def test_what_transformers_keeps_in_fp32_is_refused_in_another_dtype(
    make: Callable[[], Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    saved = make().to(dtype)
    saved.save_pretrained(tmp_path)
    with empty_weights():
        empty = type(saved)._from_config(AutoConfig.from_pretrained(tmp_path))
    kept = [
        name
        for name, value in type(saved).from_pretrained(tmp_path).state_dict().items()
        if value.dtype == torch.float32 and empty.state_dict()[name].dtype == dtype
    ]
    if kept:
        with pytest.raises(InputError, match=f"{kept[0]}.*keeps it in float32"):
            attach(empty, budget={"HBM": None}, weights=tmp_path)
        assert all(parameter.is_meta for parameter in empty.parameters())
    else:
        attach(empty, budget={"HBM": None}, weights=tmp_path).detach()


CLASSES = {
    "gpt2": ["AutoModelForCausalLM", transformers.AutoModel, "GPT2Model", None],
    "qwen3.5": ["AutoModelForCausalLM", None],
    "gemma3": ["AutoModelForCausalLM", "AutoModelForImageTextToText", None],
    "bert": [transformers.AutoModelForMaskedLM, "BertForMaskedLM"],
    "bart": ["AutoModelForSeq2SeqLM", transformers.BartModel],
    "clip": [transformers.CLIPTextModel, "CLIPVisionModel", transformers.AutoModel],
}


@pytest.mark.filterwarnings("ignore:checkpoint .* has tensors that the model doesn't take")
@pytest.mark.parametrize(
    ("name", "given"), [(name, given) for name, classes in CLASSES.items() for given in classes]
)
def test_a_class_of_transformers_can_be_asked_for(name: str, given: Any, tmp_path: Path) -> None:
    MODELS[name][0]().save_pretrained(tmp_path)
    asked = getattr(transformers, given) if isinstance(given, str) else given
    want = (asked or type(MODELS[name][0]())).from_pretrained(tmp_path)
    model = load(tmp_path, given)
    assert described(model) == described(want)
    with attach(model, budget={"HBM": None}, weights=tmp_path):
        state = model.state_dict()
        assert all(torch.equal(state[name], value) for name, value in want.state_dict().items())


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("AutoModelForSeq2SeqLM", r"\(bert\) is not supported by AutoModelForSeq2SeqLM"),
        ("AutoModelForSequenceClassification", "no tensor 'bert.pooler.dense.weight'"),
        ("BertModel", "no tensor 'pooler.dense.weight'"),
        ("BertForBreakfast", "not a class of transformers"),
    ],
)
def test_a_class_that_the_checkpoint_is_not_of_is_refused(
    given: str, problem: str, tmp_path: Path
) -> None:
    build("BertForMaskedLM", SMALL).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=problem):
        load(tmp_path, given)


def test_a_folder_that_can_t_be_loaded_is_refused_by_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"not a \.safetensors file"):
        load(tmp_path)
    build("MarianMTModel", HALVED).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"'model\.encoder\.embed_positions.*computes it"):
        load(tmp_path)
    tiny_gpt2().save_pretrained(tmp_path)
    change_config(tmp_path, architectures=["Gpt2WithRemoteCode"])
    with pytest.raises(InputError, match="'Gpt2WithRemoteCode', which transformers doesn't have"):
        load(tmp_path)
    change_config(tmp_path, architectures=None)
    assert type(load(tmp_path)) is type(tiny_gpt2())
    with pytest.raises(InputError, match="dtype 'fp7' is unknown"):
        load(tmp_path, dtype="fp7")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="merge it"):
        load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match=r"adapter|config\.json"):
        load(tmp_path)


def test_attention_is_what_was_asked_for(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    model = load(tmp_path, attn_implementation="eager")
    want = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert described(model) == described(want)


TIED = {
    "llama": (tied_llama, ["lm_head.weight"], words),
    "gpt2": (tiny_gpt2, ["lm_head.weight"], words),
    "bert": (
        lambda: build("BertForMaskedLM", SMALL),
        ["cls.predictions.decoder.weight"],
        words,
    ),
    "t5 head": (t5, ["lm_head.weight"], both),
    "bart": (
        lambda: build("BartForConditionalGeneration", HALVED),
        ["lm_head.weight", "model.encoder.embed_tokens.weight"],
        both,
    ),
}


def rewrite(folder: Path, **tensors: Tensor) -> None:
    path = folder / "model.safetensors"
    state = {**load_file(path), **tensors}
    save_file({k: v.clone() for k, v in state.items()}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("name", TIED)
def test_what_the_checkpoint_has_twice_is_tied_where_it_is_equal(name: str, tmp_path: Path) -> None:
    make, heads, run = TIED[name]
    saved = make()
    saved.save_pretrained(tmp_path)
    rewrite(tmp_path, **{head: saved.state_dict()[head] for head in heads})
    want = type(saved).from_pretrained(tmp_path)
    model = load(tmp_path)
    assert tied_names(model) == tied_names(want) == tied_names(saved)
    with torch.no_grad():
        for each in (model, by_class(saved, tmp_path)):
            with attach(each, budget={"HBM": None}, weights=tmp_path):
                assert torch.equal(run(each), run(want))


@pytest.mark.parametrize("name", TIED)
def test_what_the_checkpoint_has_in_two_versions_is_not_tied(name: str, tmp_path: Path) -> None:
    make, heads, run = TIED[name]
    saved = make()
    saved.save_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(1)
    changed = {h: torch.randn(saved.state_dict()[h].shape, generator=generator) for h in heads}
    rewrite(tmp_path, **changed)
    want = type(saved).from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=f"{heads[0]}.*different values.*not tied"):
        model = load(tmp_path)
    assert described(model) == described(want)
    assert tied_names(model) != tied_names(saved)
    with torch.no_grad():
        with attach(model, budget={"HBM": None}, weights=tmp_path):
            assert torch.equal(run(model), run(want))
        with pytest.raises(InputError, match=f"{heads[-1]}.*different values.*load"):
            attach(by_class(saved, tmp_path), budget={"HBM": None}, weights=tmp_path)


def by_class(model: Any, folder: Path) -> Any:
    with empty_weights():
        return type(model)._from_config(AutoConfig.from_pretrained(folder)).eval()


def test_the_head_alone_is_enough_where_the_config_ties_it(tmp_path: Path) -> None:
    saved = tied_llama()
    saved.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    want, model = LlamaForCausalLM.from_pretrained(tmp_path), load(tmp_path)
    assert tied_names(model) == tied_names(want)
    with torch.no_grad(), attach(model, budget={"HBM": None}, weights=tmp_path):
        assert torch.equal(words(model), words(want))
