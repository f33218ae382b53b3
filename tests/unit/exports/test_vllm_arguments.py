"""vLLM's offload arguments, from tiers."""

import pytest
import torch
import yaml
from export_models import outline_of, tiny_llama

from lib.errors import InputError
from lib.exports import export_vllm
from lib.units import GIB
from lib.vocabulary import Tier


def test_bytes_outside_fast_memory_are_offloaded() -> None:
    outline = outline_of(tiny_llama(256), tiers=(Tier.HBM, Tier.CPU, Tier.SSD))
    export = export_vllm(outline)
    arguments = yaml.safe_load(export.files["vllm.yaml"])
    away = sum(
        block.num_bytes
        for block in outline.blocks
        if block.layer is not None and block.hint.tier is not Tier.HBM
    )
    assert export.summary["offloaded_bytes"] == away
    assert arguments["cpu-offload-gb"] == pytest.approx(away / GIB, abs=1e-6)
    lost = " | ".join(export.lost)
    assert "which layers" in lost and "tiers SSD" in lost and "precision per block" in lost


def test_only_the_kind_that_the_hints_offload_is_named() -> None:
    model = tiny_llama(256)
    kinds = {"mlp": Tier.CPU}
    names = [block.name for block in outline_of(model).blocks]
    tiers = [kinds.get(name.rpartition(".")[2], Tier.HBM) for name in names]
    arguments = yaml.safe_load(export_vllm(outline_of(model, tiers=tiers)).files["vllm.yaml"])
    assert arguments["cpu-offload-params"] == ["mlp"]


def test_a_model_in_fast_memory_offloads_nothing() -> None:
    export = export_vllm(outline_of(tiny_llama(), tiers=(Tier.HBM,)))
    assert yaml.safe_load(export.files["vllm.yaml"]) == {"cpu-offload-gb": 0}


def test_blocks_outside_the_layers_and_models_without_layers_are_said() -> None:
    export = export_vllm(outline_of(tiny_llama(), tiers=(Tier.CPU,)))
    assert any(line.startswith("model.embed_tokens, model.norm, lm_head") for line in export.lost)
    with pytest.raises(InputError, match="has none"):
        export_vllm(outline_of(torch.nn.Sequential(torch.nn.Linear(4, 4))))
