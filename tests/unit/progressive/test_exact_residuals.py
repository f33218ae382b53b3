"""Exact output on a slow disk: of the full weights only what the draft lacks is read."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lib.checkpoint.load import load
from lib.codecs.native import load_native
from lib.errors import InputError, PlacementError
from lib.machine import UNMEASURED, MachineProfile, TierSpec
from lib.progressive.attach import attach
from lib.progressive.division import divide
from lib.progressive.exact import ExactRuntime
from lib.vocabulary import Tier

pytestmark = pytest.mark.skipif(load_native().library is None, reason="the extension isn't there")
BUDGET = {"HBM": 22 * 2**20, "SSD": None}
IDS = torch.arange(1, 9).view(1, -1)


def machine(gb_s: float) -> MachineProfile:
    return replace(UNMEASURED, tiers={**UNMEASURED.tiers, Tier.SSD: TierSpec("SSD", 100, gb_s)})


SLOW, FAST = machine(0.01), machine(50)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint of 22 MiB in bf16."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=2048,
        max_position_embeddings=128,
        initializer_range=0.05,
        tie_word_embeddings=True,
    )
    saved = tmp_path_factory.mktemp("residuals") / "model"
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(saved)
    return saved


def attached(folder: Path, spill: Path, profile: MachineProfile) -> tuple[Any, ExactRuntime]:
    model = load(folder)
    runtime = attach(
        model,
        weights=folder,
        budget=BUDGET,
        exact=True,
        precision="int8",
        machine=profile,
        spill_dir=spill,
    )
    assert isinstance(runtime, ExactRuntime)
    return model, runtime


def generate(model: Any) -> list[int]:
    tokens: list[int] = model.generate(IDS, max_new_tokens=24, do_sample=False)[0].tolist()
    return tokens


def test_the_text_and_the_logits_are_those_of_the_weights_as_they_are(
    folder: Path, tmp_path: Path
) -> None:
    found = []
    for name, profile in (("slow", SLOW), ("fast", FAST)):
        model, runtime = attached(folder, tmp_path / name, profile)
        with runtime, torch.no_grad():
            assert bool(runtime.draft.staging_bytes) == (name == "slow")
            found.append((generate(model), model(IDS).logits))
            stats = runtime.stats()
            assert stats.bytes_moved > 0
            assert stats.peak_resident_bytes <= BUDGET["HBM"]  # type: ignore[operator]
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_fewer_bytes_are_on_the_disk(folder: Path, tmp_path: Path) -> None:
    _, runtime = attached(folder, tmp_path, SLOW)
    with runtime:
        plan = runtime.plan
        streamed = {name for name, place in plan.placements.items() if place.tier is Tier.SSD}
        sizes = {block.name: block.num_bytes for block in runtime._keeper.planning._blocks}
        kept = {path for path in tmp_path.iterdir() if path.suffix == ".block"}
        records = runtime.draft.runtime.plan.fast_bytes
        on_disk = sum(path.stat().st_size for path in kept)
        moved = sum(size for name, size in sizes.items() if name in streamed)
    assert moved > 2**23
    assert on_disk - records < 0.4 * moved


def test_another_budget_is_another_plan_with_the_draft_as_it_is(
    folder: Path, tmp_path: Path
) -> None:
    model, runtime = attached(folder, tmp_path, SLOW)
    with runtime:
        before = generate(model)
        runtime.budget = {"HBM": 26 * 2**20, "SSD": None}
        assert generate(model) == before
        runtime.budget = BUDGET
        assert runtime.budget == BUDGET
        assert generate(model) == before
        with pytest.raises(InputError, match="too small"):
            runtime.budget = {"HBM": 2**23, "SSD": None}
        assert generate(model) == before


def test_a_damaged_file_stops_the_text_with_its_name(folder: Path, tmp_path: Path) -> None:
    attached(folder, tmp_path, SLOW)[1].detach()
    model, runtime = attached(folder, tmp_path, SLOW)
    with runtime:
        for path in tmp_path.glob("*.block"):
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 0xFF
            path.write_bytes(data)
        with pytest.raises(PlacementError, match="block"):
            generate(model)


def test_weights_in_memory_have_no_residuals(folder: Path) -> None:
    """They are stored once, and detach reads them back without the draft."""
    model = load(folder)
    from_checkpoint = divide(
        model, None, budget=BUDGET, precision="int8", weights=folder, machine=SLOW
    )
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    in_memory = divide(loaded, None, budget=BUDGET, precision="int8", machine=SLOW)
    assert from_checkpoint.residuals and not in_memory.residuals
    assert from_checkpoint.tokens_per_second > 1.5 * in_memory.tokens_per_second
