"""Allocations compared end to end, on a model trained for seconds."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import tiny_config
from transformers import AutoModelForCausalLM

from gpt2.train import train
from lib.commands import calibrate as calibrate_hints
from lib.errors import InputError
from lib.evaluation import calibrate as calibration
from lib.text.parts import TextParts
from scripts.experiments.allocations import allocation_arms, compare_allocations

ARMS = {"ours", "uniform", "magnitude", "depth", "random", "shuffled", "inverse", "oracle"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    config, path = tiny_config(
        tmp_path_factory.mktemp("run"), GPT2_WIDTH=64, TRAIN_EVAL_SEQUENCES=8
    )
    result = train(config, path)
    return ["--model", result["checkpoint"], "--tier-hints", result["hints"]]


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "DRAWS", 16)
    monkeypatch.setattr(allocation_arms, "DRAWS", 3)


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert compare_allocations.main(arguments) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert isinstance(document, dict)
    return document


def test_every_arm_is_measured_at_the_same_bytes(
    model: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "allocations.json"
    document = run([*model, "--bits", "4", "5.5", "--json", str(file)], capsys)
    assert json.loads(file.read_text()) == document
    assert str(document["curves"]).startswith("computed here")
    bits = document["bits"]
    assert isinstance(bits, dict) and list(bits) == ["4.0", "5.5"]
    for budget, row in bits.items():
        assert set(row["kl"]) == set(row["ppl"]) == ARMS
        assert all(kl > 0 for kl in row["kl"].values())
        assert all(used <= float(budget) + 1e-9 for used in row["used_bits"].values())
        assert row["log_chord_fraction"] == pytest.approx(row["kl"]["ours"] / row["log_chord_kl"])
        assert row["predicted_over_measured"] > 0
        for ratio in compare_allocations.RATIOS.values():
            low, high = row["interval"][ratio]
            assert low <= row[ratio] <= high


def test_calibrated_hints_are_taken(
    model: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    hints = str(tmp_path / "calibrated.json")
    assert calibrate_hints.main([*model, "--output", hints, "--draws", "8"]) == 0
    capsys.readouterr()
    document = run([*model[:3], hints, "--bits", "4"], capsys)
    assert document["curves"] == "the hints"
    # The same text cut in another way, and hints that don't say what they were calibrated on.
    other = run([*model[:3], hints, "--bits", "4", "--sequence-length", "8"], capsys)
    assert str(other["curves"]).startswith("computed here")
    stale = json.loads(Path(hints).read_text())
    del stale["quality"]["text"]["digest"]
    Path(hints).write_text(json.dumps(stale))
    assert str(run([*model[:3], hints, "--bits", "4"], capsys)["curves"]).startswith("computed")


def test_the_digest_is_of_the_tokens_and_their_parts() -> None:
    def parts(tokens: torch.Tensor, source: str) -> TextParts:
        first, second, third = (tokens[part::3] for part in range(3))
        return TextParts(fisher=first, calibration=second, judging=third, source=source, seed=None)

    tokens = torch.arange(96).reshape(6, 16)
    digest = parts(tokens, "README.md").digest
    assert parts(tokens, "./README.md").digest == digest
    assert parts(tokens + 1, "README.md").digest != digest
    assert parts(tokens.reshape(12, 8), "README.md").digest != digest


def test_a_budget_outside_the_uniform_widths_is_refused(model: list[str]) -> None:
    with pytest.raises(Exception, match="lies outside this model's uniform widths"):
        compare_allocations.main([*model, "--bits", "1"])


def test_default_budgets_outside_the_uniform_widths_are_left_out(
    model: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_allocations, "BITS", (1.0, 4.0, 40.0))
    assert compare_allocations.main(model) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("left out of the default budgets: 1 40, outside this model's")
    assert list(json.loads(lines[-1])["bits"]) == ["4.0"]
    monkeypatch.setattr(compare_allocations, "BITS", (1.0, 40.0))
    with pytest.raises(InputError, match=r"default budgets \(1 40\) lie outside .* give --bits"):
        compare_allocations.main(model)


def test_a_width_that_holds_the_weights_exactly_is_no_end_of_a_chord(
    model: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(model[1], tmp_path / "bf16"))
    AutoModelForCausalLM.from_pretrained(copy, dtype=torch.bfloat16).save_pretrained(copy)
    arguments = ["--model", str(copy), *model[2:], "--bits"]
    document = run([*arguments, "5.5"], capsys)
    assert "bf16" not in document["uniform_widths"]
    assert document["bits"]["5.5"]["log_chord_kl"] > 0
    with pytest.raises(InputError, match="lies outside this model's uniform widths"):
        compare_allocations.main([*arguments, "12"])
