"""The benchmark of the controller, on models of a few thousand weights: its figures' names."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from lib.commands.cli import run_main
from scripts.experiments.controller import bench_controller, policies
from scripts.experiments.controller.bench_controller import main

FIGURES = {"resident_hit", "ready_hit", "bytes", "tokens_per_s", "stall_s"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            hidden_size=32,
            intermediate_size=32,
            moe_intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            num_experts=16,
            num_experts_per_tok=2,
            vocab_size=64,
            max_position_embeddings=24,
            initializer_range=0.3,
        )
    )
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder)
    tokens = torch.randint(1, 64, (2, 24), generator=torch.Generator().manual_seed(0))
    save_file({"tokens": tokens}, folder / "heldout.safetensors")
    return folder


def test_the_last_line_has_what_the_contract_names(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(bench_controller, "_QUICK_SECONDS", 1.0)
    monkeypatch.setattr(policies, "_GROUP_SHARE", 0.5)
    written = tmp_path / "out.json"
    options = ["--model", str(checkpoint), "--quick", "--json", str(written)]
    assert main(options) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document == json.loads(written.read_text())
    scenarios = document["scenarios"]
    for name in ("ours", "belady", "lru", "lfu", "static"):
        assert {"bytes", "tokens_per_s", "stall_s"} <= scenarios["dense"][name].keys()
    assert scenarios["dense"]["ours"]["bytes"] >= scenarios["dense"]["belady"]["bytes"]
    mixture = scenarios["moe"]
    assert mixture["x_over_c"] == 1.0
    assert mixture["outputs_equal"]
    for share in ("0.1", "0.2"):
        found = mixture["resident"][share]
        for name in ("ours", "lru", "lfu", "popularity", "bound"):
            assert found[name].keys() >= FIGURES
        bound = found["bound"]
        for name in ("ours", "ours_on_demand", "lru", "lfu", "popularity"):
            assert found[name]["bytes"] >= bound["bytes"]
            assert found[name]["resident_hit"] <= bound["resident_hit"]
        assert found["lru"]["predicted"] == 0
    ahead = mixture["lookahead"]
    assert ahead.keys() >= {"slot_recall", "control_recall", "miss_coverage", "wasted_per_useful"}
    assert ahead["control_recall"] == 1.0
    assert mixture["group"]["ratio"] > 0
    assert all(each["outputs_equal"] for each in scenarios["mix"]["prompts"].values())
    pressure = scenarios["pressure"]
    assert {"transitions_per_block_max", "recover_ms_max"} <= pressure.keys()
    assert pressure["outputs_equal"]


def test_a_missing_mixture_is_told_how_to_make(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_main(lambda: main(["--model", "nowhere"])) == 2
    assert "moe-quickstart_defconfig" in capsys.readouterr().err
