"""tierhints from-checkpoint on a run of the Hugging Face Trainer, and on files to be refused."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_llama
from transformers import Trainer, TrainingArguments

from lib.commands.__main__ import main
from lib.hints import load_hints
from lib.signals import TierHintsCallback

pytest.importorskip("accelerate", reason="the Trainer needs it")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 20 steps, beside which the callback has written the live hints."""
    folder = tmp_path_factory.mktemp("run")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 40, (16, 10), generator=generator)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=20,
        save_steps=20,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        weight_decay=0.1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(
        model=tiny_llama(),
        args=arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],  # type: ignore[arg-type]
        callbacks=[TierHintsCallback(folder / "live.json")],
    ).train()
    return folder / "checkpoint-20"


def test_a_trainers_checkpoint_gives_the_hints_of_its_callback(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "tier_hints.json"
    assert main(["from-checkpoint", str(run), "--output", str(output)]) == 0
    written = capsys.readouterr()
    assert written.err.startswith("note: ") and len(written.err.splitlines()) == 1
    assert "torch state_dict, AdamW at step 20" in written.out
    result = json.loads(written.out.splitlines()[-1])
    assert result["source"] == str(run / "optimizer.pt") and result["blocks"] == 11

    live, found = load_hints(run / "live.json"), load_hints(output)
    assert live.model is not None and found.model is not None
    assert live.model.parameter_digest == found.model.parameter_digest
    assert live.blocks.keys() == found.blocks.keys()
    for name, block in live.blocks.items():
        other = found.blocks[name]
        assert (block.importance, block.rank, block.tier) == (
            other.importance, other.rank, other.tier
        )  # fmt: skip
        for signal in ("adam_exp_avg_sq", "adam_exp_avg_sq_sum"):
            assert block.signals[signal] == other.signals[signal]


def test_a_file_that_is_read_is_not_written_over(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, config = run / "optimizer.pt", run / "config.json"
    link = tmp_path / "link.json"
    link.symlink_to(state)
    before = state.read_bytes(), config.read_bytes()
    hints = tmp_path / "tier_hints.json"
    for flags in (
        ["--output", str(state)],
        ["--output", str(config)],
        ["--output", str(link)],
        ["--output", str(hints), "--json", str(state)],
        ["--output", str(hints), "--json", str(config)],
    ):
        assert main(["from-checkpoint", str(run), *flags]) == 2
        written = capsys.readouterr()
        assert "exists and was not written by this command: give another name" in written.err
        assert (state.read_bytes(), config.read_bytes()) == before and not hints.exists()
    result = tmp_path / "result.json"
    for _ in range(2):  # its own files are written anew
        flags = ["--output", str(hints), "--json", str(result)]
        assert main(["from-checkpoint", str(run), *flags]) == 0
        assert json.loads(result.read_text())["missing_moments"] == 0


class Attack:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("what", ["malicious", "foreign", "truncated", "quantized"])
def test_what_is_refused_is_one_line_and_exit_2(
    what: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, ran = tmp_path / "optimizer.pt", tmp_path / "ran"
    document = torch.load(run / "optimizer.pt")
    if what == "malicious":
        torch.save({**document, "more": Attack(ran)}, path)
    elif what == "foreign":
        torch.save({"weights": torch.ones(3)}, path)
    elif what == "truncated":
        data = (run / "optimizer.pt").read_bytes()
        path.write_bytes(data[: len(data) // 2])
    else:
        state = {number: {"state1": torch.ones(2), "state2": torch.ones(2)} for number in range(3)}
        torch.save({**document, "state": state}, path)
    output = tmp_path / "tier_hints.json"
    arguments = ["from-checkpoint", str(path), "--model", str(run), "--output", str(output)]
    assert main(arguments) == 2
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err.startswith("error: ") and len(written.err.splitlines()) == 1
    assert not ran.exists() and not output.exists()
