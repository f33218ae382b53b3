"""Mixtures of experts trained end to end: counts of routers survive stops, and are in the hints."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import read_tensors, tiny_config, write_config
from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM

from gpt2.train import train
from gpt2.trainer import Trainer
from lib.config import load_config
from lib.errors import InputError
from lib.hints import load_hints

MOE: dict[str, Any] = {
    "MODEL_QWEN3_MOE": True,
    "MOE_EXPERTS": 4,
    "MOE_EXPERT_WIDTH": 8,
    "TRAIN_ACCUMULATION": 2,
}
SLOTS = 8 * 4 * 2 * 16 * 2
"""Steps, sequences, accumulation, tokens, experts per token."""


def router_counts(run: Path) -> dict[str, float]:
    blocks = load_hints(run / "tier_hints.json").blocks
    return {
        n: b.signals["router_counts"] for n, b in blocks.items() if "router_counts" in b.signals
    }  # type: ignore[misc]


def test_a_stopped_and_continued_run_equals_an_unbroken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, path = tiny_config(tmp_path, RUN_NAME="whole", **MOE)
    train(whole, path)
    parts, path = tiny_config(tmp_path, RUN_NAME="parts", **MOE)
    step = Trainer._step
    with monkeypatch.context() as patch:
        patch.setattr(
            Trainer,
            "_step",
            lambda self, number, **kw: step(self, number, **kw | {"stop": number == 3}),
        )
        assert not train(parts, path)["complete"]
    assert train(parts, path)["complete"]
    first, second = whole.run.directory, parts.run.directory
    one, other = (read_tensors(run / "checkpoint") for run in (first, second))
    assert one.keys() == other.keys()
    for name, tensor in one.items():  # products of some processors round by where memory lies
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-7)
    counts = router_counts(first)
    assert counts == router_counts(second) and len(counts) == 8
    for layer in range(2):
        assert sum(n for name, n in counts.items() if f"layers.{layer}." in name) == SLOTS
    provenance = load_hints(first / "tier_hints.json").provenance
    assert provenance["router_counts"] == "while training"
    assert provenance["router_auxiliary_loss"] == 0.01
    line = json.loads((first / "metrics.jsonl").read_text().splitlines()[0])
    assert 0.9 < line["balance_loss"] < 4
    loaded = AutoModelForCausalLM.from_pretrained(first / "checkpoint")
    assert isinstance(loaded, Qwen3MoeForCausalLM)
    assert loaded(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.parametrize(
    ("symbols", "message"),
    [
        ({"MOE_TOP_K": 5}, "MOE_TOP_K=5 is more than MOE_EXPERTS, which is 4"),
        ({"MOE_BALANCE": "-1"}, r"MOE_BALANCE.*\[0, 10\]"),
        ({"GPT2_DROPOUT_PCT": 10}, "GPT2_DROPOUT_PCT=10 has no effect: it needs MODEL_GPT2"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    tmp_path: Path, symbols: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load_config(write_config(tmp_path, **MOE | symbols))


def test_rotary_heads_of_odd_width_are_refused(tmp_path: Path) -> None:
    config, path = tiny_config(tmp_path, **MOE, GPT2_HEADS=16)
    with pytest.raises(InputError, match="heads of 1 channels, and rotary positions need an even"):
        train(config, path)
