"""Tiers as a device map, loaded by Accelerate and Transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from export_models import outline_of, tiny_llama
from tiny_models import tiny_gpt2, tiny_mixtral
from transformers import AutoModelForCausalLM

from lib.exports import export_device_map
from lib.vocabulary import Tier

accelerate = pytest.importorskip("accelerate")

TOKENS = torch.arange(24).reshape(2, 12)


def exported(model: torch.nn.Module, device: str = "cpu", **options: Any) -> dict[str, Any]:
    export = export_device_map(outline_of(model, **options), device=device)
    document: dict[str, Any] = json.loads(export.files["device_map.json"])
    return document


@pytest.mark.parametrize(
    "build", [tiny_gpt2, tiny_mixtral, tiny_llama, lambda: tiny_llama(tied=True)]
)
def test_a_model_loaded_with_the_map_computes_the_same(
    build: Callable[[], Any], tmp_path: Path
) -> None:
    model = build().eval()
    model.save_pretrained(tmp_path)
    device_map = exported(model)["device_map"]
    assert {"cpu", "disk"} <= set(device_map.values())
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    assert loaded.hf_device_map == device_map
    for name, place in device_map.items():
        parameters = dict(loaded.get_submodule(name).named_parameters())
        assert all((p.device.type == "meta") == (place == "disk") for p in parameters.values())


def test_a_model_in_memory_is_dispatched_with_the_map(tmp_path: Path) -> None:
    model, twin = tiny_gpt2().eval(), tiny_gpt2().eval()
    device_map = exported(model)["device_map"]
    dispatched = accelerate.dispatch_model(model, device_map, offload_dir=tmp_path)
    with torch.no_grad():
        assert torch.equal(dispatched(TOKENS).logits, twin(TOKENS).logits)


@pytest.mark.gpu
@pytest.mark.parametrize("build", [tiny_gpt2, tiny_mixtral, tiny_llama])
def test_a_model_loaded_with_the_map_of_a_gpu(build: Callable[[], Any], tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model = build().eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        device_map=exported(model, "cuda")["device_map"],
        offload_folder=tmp_path / "offload",
    )
    with torch.no_grad():
        own = model.cuda()(TOKENS.cuda()).logits
        assert torch.equal(loaded(TOKENS.cuda()).logits.cuda(), own)


def test_tied_modules_stay_together_and_bytes_add_up() -> None:
    model = tiny_gpt2()
    document = exported(model, "cuda")
    assert document["device_map"]["lm_head"] == document["device_map"]["transformer.wte"]
    assert set(document["device_map"].values()) == {0, "cpu", "disk"}
    outline = outline_of(model)
    expected = {
        place: sum(block.num_bytes for block in outline.blocks if block.hint.tier is tier)
        for place, tier in (("0", Tier.HBM), ("cpu", Tier.CPU))
    }
    assert document["max_memory"] == expected


def test_what_a_device_map_cannot_say_is_said() -> None:
    outline = outline_of(tiny_mixtral(), tiers=(Tier.HBM, Tier.CPU, Tier.CXL, Tier.OBJECT))
    lost = " | ".join(export_device_map(outline, device="cuda").lost)
    assert "experts of one packed parameter can't be placed apart" in lost
    assert "tier CXL: a device map has no such place, 'cpu' is used" in lost
    assert "tier OBJECT: a device map has no such place, 'disk' is used" in lost
    assert "2 modules that the model wants whole (model.layers.0, model.layers.1)" in lost
    on_cpu = export_device_map(outline_of(tiny_llama()), device="cpu").lost
    assert any("both are the RAM" in line for line in on_cpu)


def test_everything_in_one_tier_splits_nothing() -> None:
    export = export_device_map(outline_of(tiny_llama(), tiers=(Tier.HBM,)), device="cuda")
    assert set(json.loads(export.files["device_map.json"])["device_map"].values()) == {0}
    assert len(export.lost) == 1 and "order of reading ahead" in export.lost[0]
    assert "offload_folder" not in export.commands[1]
