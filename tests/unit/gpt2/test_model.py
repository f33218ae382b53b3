"""The network: from scratch, from weights, and sizes that don't fit together."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt2.model import build_model, load_model
from lib.config import ModelConfig
from lib.errors import InputError

MODEL = ModelConfig(
    pretrained="", layers=2, heads=2, width=8, context=16, vocab_size=50, dropout=0.1, moe=None
)


class Tokenizer(SimpleNamespace):
    def __len__(self) -> int:
        return int(self.size)


TOKENIZER = Tokenizer(size=50, eos_token_id=0)


def test_scratch_model_has_the_configured_size_and_seed() -> None:
    model = build_model(MODEL, TOKENIZER, seed=3)
    same, other = (build_model(MODEL, TOKENIZER, seed=seed) for seed in (3, 4))
    assert model.config._attn_implementation == "sdpa"
    assert (model.config.n_layer, model.config.resid_pdrop) == (2, 0.1)
    assert model.transformer.wpe.weight.shape == (16, 8)
    assert torch.equal(model.transformer.wte.weight, same.transformer.wte.weight)
    assert not torch.equal(model.transformer.wte.weight, other.transformer.wte.weight)


def test_folder_gives_its_weights_with_the_configured_dropout(tmp_path: Path) -> None:
    model = build_model(MODEL, TOKENIZER, seed=3)
    model.save_pretrained(tmp_path)
    given = replace(MODEL, pretrained=str(tmp_path), dropout=0.3, context=8)
    for loaded in (build_model(given, TOKENIZER, seed=9), load_model(tmp_path, dropout=0.3)):
        assert torch.equal(loaded.transformer.wte.weight, model.transformer.wte.weight)
        assert loaded.transformer.h[0].mlp.dropout.p == 0.3


@pytest.mark.parametrize(
    ("change", "size", "message"),
    [
        ({"heads": 3}, 50, "GPT2_WIDTH=8 is not a multiple of GPT2_HEADS=3"),
        ({}, 51, "tokenizer has 51 tokens, GPT2_VOCAB_SIZE only 50"),
        ({"pretrained": "no/such/folder"}, 50, "GPT2_PRETRAINED='no/such/folder' can't be loaded"),
    ],
)
def test_sizes_that_do_not_fit_are_input_errors(change: dict, size: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_model(replace(MODEL, **change), Tokenizer(size=size, eos_token_id=0), seed=0)


def test_weights_that_do_not_fit_are_input_errors(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    build_model(MODEL, TOKENIZER, seed=3).save_pretrained(tmp_path / "gpt2")
    LlamaConfig().save_pretrained(tmp_path / "llama")
    folder = replace(MODEL, pretrained=str(tmp_path / "gpt2"))
    with pytest.raises(InputError, match="more than the 16 positions"):
        build_model(replace(folder, context=32), TOKENIZER, seed=0)
    with pytest.raises(InputError, match="is a llama model"):
        build_model(replace(MODEL, pretrained=str(tmp_path / "llama")), TOKENIZER, seed=0)
    weights = tmp_path / "gpt2" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(InputError, match="no weights for transformer.h.1.mlp.c_fc.weight"):
        build_model(folder, TOKENIZER, seed=0)
    weights.write_bytes(b"not tensors")
    with pytest.raises(InputError, match="can't be loaded"):
        build_model(folder, TOKENIZER, seed=0)
