"""Causal language models loaded whole, as commands take them."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import tiny_gpt2, tiny_llama, tiny_mixtral

from lib.checkpoint.models import load_model
from lib.errors import InputError

SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
XL = {"vocab_size": 40, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}
XLM = {"vocab_size": 40, "emb_dim": 32, "n_layers": 2, "n_heads": 4}
ENCODERS = {
    "BertForMaskedLM": SMALL,
    "RobertaForMaskedLM": {**SMALL, "pad_token_id": 1, "max_position_embeddings": 32},
    "ElectraForMaskedLM": {**SMALL, "embedding_size": 32},
    "XLMRobertaForMaskedLM": {**SMALL, "pad_token_id": 1, "max_position_embeddings": 32},
    "XLNetLMHeadModel": XL,
    "XLMWithLMHeadModel": XLM,
    "BertLMHeadModel": SMALL,
}
DECODERS = {
    "BertLMHeadModel": {**SMALL, "is_decoder": True},
    "XLMWithLMHeadModel": {**XLM, "causal": True},
    "GPTNeoXForCausalLM": {**SMALL, "max_position_embeddings": 32},
    "BartForCausalLM": {"vocab_size": 40, "d_model": 32, "decoder_layers": 2},
    "MambaForCausalLM": {**SMALL, "state_size": 4, "time_step_rank": 4},
}


def save(name: str, config: dict[str, Any], dtype: torch.dtype, folder: Path) -> None:
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    model_class(model_class.config_class(**config)).to(dtype).save_pretrained(folder)


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_is_refused(name: str, tmp_path: Path) -> None:
    save(name, ENCODERS[name], torch.float32, tmp_path)
    with pytest.raises(InputError, match=r"(?s)not a causal language model|lacks weights"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_encoder_of_16_bits_is_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    save("BertForMaskedLM", SMALL, dtype, tmp_path)
    with pytest.raises(InputError, match="not a causal language model"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_is_loaded(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save(name, DECODERS[name], dtype, tmp_path)
    assert load_model(str(tmp_path)).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixture_of_experts_is_loaded(dtype: torch.dtype, tmp_path: Path) -> None:
    tiny_mixtral().to(dtype).save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).dtype == dtype


def test_a_model_without_a_causal_class_is_refused(tmp_path: Path) -> None:
    save("T5ForConditionalGeneration", {"vocab_size": 40, "d_model": 32}, torch.float32, tmp_path)
    with pytest.raises(InputError, match="can't be loaded: Unrecognized configuration class"):
        load_model(str(tmp_path))


def test_integer_codes_are_refused(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = {
        name: (value * 100).to(torch.int8) if "proj" in name else value
        for name, value in load_file(path).items()
    }
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match="codes in place of floating-point weights"):
        load_model(str(tmp_path))
    tiny_llama().save_pretrained(tmp_path / "whole")
    with pytest.raises(InputError, match="codes in place of floating-point weights"):
        load_model(str(tmp_path / "whole"), path)


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "compressed-tensors"])
def test_a_quantized_model_that_transformers_can_t_open_here_is_an_error_of_one_line(
    method: str, tmp_path: Path
) -> None:
    tiny_llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as caught:
        load_model(str(tmp_path))
    assert len(str(caught.value).splitlines()) == 1


def test_what_transformers_dequantizes_is_loaded(tmp_path: Path) -> None:
    """Block-wise fp8 needs a GPU, and becomes floats without one."""
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    for name in [name for name in state if "proj" in name]:
        scale = state[name].abs().max() / 448
        state[name] = (state[name] / scale).to(torch.float8_e4m3fn)
        state[f"{name}_scale_inv"] = scale.reshape(1, 1)
    save_file(state, path, metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_model(str(tmp_path))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = model.eval()(ids).logits
        assert (loaded(ids).logits.float() - expected).abs().max() < 0.5 * expected.abs().max()


def test_transformers_warnings_are_heard(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_gpt2()
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    spare = {"lm_head.weight": torch.randn(40, 16), "score.weight": torch.ones(2, 16)}
    save_file({**load_file(path), **spare}, path, metadata={"format": "pt"})
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        load_model(str(tmp_path))
    finally:
        logger.removeHandler(caplog.handler)
    assert "we will NOT tie them" in caplog.text
    assert "score.weight" in caplog.text
