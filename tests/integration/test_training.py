"""Training end to end: the files of a run, continuing bit for bit, stopping, failing well."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_run import ROOT, read_tensors, tiny_config, write_config

from gpt2 import checkpoint as gpt2_checkpoint
from gpt2 import trainer as gpt2_trainer
from gpt2.checkpoint import load_state
from gpt2.rundir import RunDirectory
from gpt2.train import main, train
from gpt2.trainer import Trainer, learning_rate
from lib.commands.cli import run_main
from lib.errors import InputError
from lib.hints import load_hints


def stop_after(monkeypatch: pytest.MonkeyPatch, last_step: int) -> None:
    """Let SIGTERM come while ``last_step`` is computed."""
    step = Trainer._step

    def stepping(self: Trainer, number: int, **options: Any) -> Any:
        if number == last_step:
            signal.raise_signal(signal.SIGTERM)
            options["stop"] = True
        return step(self, number, **options)

    monkeypatch.setattr(Trainer, "_step", stepping)


def comparable_hints(path: Path) -> dict[str, Any]:
    document = json.loads(path.read_text())
    del document["provenance"]["created"]
    return document


def test_run_directory_has_every_file(tmp_path: Path) -> None:
    config, path = tiny_config(tmp_path, HINTS_ATTENTION_SEQUENCES=2, TRAIN_STEPS=30)
    result = train(config, path)
    run = config.run.directory
    assert result["complete"] and result["step"] == 30
    assert result["heldout_loss_nats"] < result["unigram_entropy_nats"]
    assert (run / ".config").read_text() == path.read_text()
    assert json.loads((run / "config.json").read_text())["train"]["steps"] == 30
    assert json.loads((run / "versions.json").read_text())["torch"] == torch.__version__
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 31))
    assert set(steps[0]) == {
        "step", "loss", "lr", "grad_norm", "clip_coefficient", "tokens_per_s", "time_s",
    }  # fmt: skip
    assert all(
        line["clip_coefficient"] == pytest.approx(min(1, 1 / line["grad_norm"]), rel=1e-4)
        for line in steps
    )
    hints = load_hints(run / "tier_hints.json")
    heads = hints.blocks["transformer.h.0.attn"].signals["attention_fim_trace"]
    assert isinstance(heads, list) and len(heads) == 2
    assert hints.provenance["tokens_per_update"] == pytest.approx(4 * 16)


def test_checkpoint_is_a_hugging_face_folder(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config, path = tiny_config(tmp_path)
    result = train(config, path)
    folder = config.run.directory / "checkpoint"
    model, tokenizer = (
        cls.from_pretrained(folder) for cls in (AutoModelForCausalLM, AutoTokenizer)
    )
    assert model.lm_head.weight is model.transformer.wte.weight
    assert tokenizer.decode(tokenizer("def f(x):")["input_ids"]) == "def f(x):"
    with safe_open(folder / "heldout.safetensors", framework="pt") as file:
        tokens, metadata = file.get_tensor("tokens"), file.metadata()
    assert tokens.shape == (6, 16) and tokens.dtype == torch.int64
    assert float(metadata["unigram_entropy_nats"]) == result["unigram_entropy_nats"]
    # The loss that training reported is the one any reader of the checkpoint measures.
    with torch.no_grad():
        loss = model(input_ids=tokens, labels=tokens).loss
    assert loss.item() == pytest.approx(result["heldout_loss_nats"], rel=1e-5)


PRUNE = {
    "TRAIN_PRUNE": True,
    "TRAIN_PRUNE_EVERY": 2,
    "TRAIN_PRUNE_START_PCT": 25,
    "TRAIN_PRUNE_END_PCT": 75,
}


@pytest.mark.parametrize(
    "extra",
    [{}, {"GPT2_DROPOUT_PCT": 20}, PRUNE, {**PRUNE, "TRAIN_PRUNE_RANDOM": True}],
    ids=["plain", "dropout", "pruning", "random pruning"],
)
def test_stopped_and_continued_run_equals_an_unbroken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: dict[str, Any]
) -> None:
    symbols = {"TRAIN_ACCUMULATION": 2, "TRAIN_BATCH_SIZE": 2, **extra}
    config, path = tiny_config(tmp_path, **symbols)
    train(config, path)
    whole = config.run.directory
    expected = comparable_hints(whole / "tier_hints.json")
    whole.rename(tmp_path / "whole")

    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        stopped = train(config, path)
    assert (stopped["step"], stopped["complete"], stopped["hints"]) == (5, False, None)
    with (config.run.directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 1.0}\n{"step": 7, "lo')  # a crash after the checkpoint
    continued = train(config, path)
    assert continued["complete"]

    expected_tensors = read_tensors(tmp_path / "whole" / "checkpoint")
    tensors = read_tensors(config.run.directory / "checkpoint")
    assert tensors.keys() == expected_tensors.keys()
    assert all(torch.equal(tensors[name], expected_tensors[name]) for name in tensors)
    assert comparable_hints(config.run.directory / "tier_hints.json") == expected
    losses = [
        [(line["step"], line["loss"]) for line in map(json.loads, file.open()) if "loss" in line]
        for file in (tmp_path / "whole/metrics.jsonl", config.run.directory / "metrics.jsonl")
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("scope", ["matrix", "global"])
def test_pruned_weights_are_zero_and_their_moments_are_not(tmp_path: Path, scope: str) -> None:
    config, path = tiny_config(
        tmp_path, **PRUNE, TRAIN_PRUNE_SPARSITY_PCT=60, TRAIN_PRUNE_GLOBAL=scope == "global"
    )
    train(config, path)
    run = config.run.directory
    tensors = read_tensors(run / "checkpoint")
    masks = load_file(run / "checkpoint" / "pruning.safetensors")
    assert len(masks) == 8  # two layers of four matrices
    kept, size = 0, 0
    for name, mask in masks.items():
        assert torch.equal(tensors[name] != 0, mask)
        assert (tensors[f"{name}/exp_avg_sq"][~mask] > 0).float().mean() > 0.9
        kept, size = kept + int(mask.sum()), size + mask.numel()
        if scope == "matrix":
            assert int(mask.sum()) == mask.numel() - round(0.6 * mask.numel())
    assert size - kept == pytest.approx(0.6 * size, abs=len(masks))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    shares = [line["sparsity"] for line in lines if "loss" in line]
    # Steps 2 to 6 of 8, every second one: halfway the cubic is at 7/8 of the end.
    assert shares == pytest.approx([0, 0, 0, 0.525, 0.525, 0.6, 0.6, 0.6], abs=0.001)


def test_damaged_masks_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, path = tiny_config(tmp_path, **PRUNE)
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        train(config, path)
    (config.run.directory / "checkpoint" / "pruning.safetensors").unlink()
    with pytest.raises(InputError, match=r"pruning\.safetensors is damaged"):
        train(config, path)


def test_run_of_before_pruning_was_known_continues(tmp_path: Path) -> None:
    config, path = tiny_config(tmp_path)
    first = train(config, path)
    document = json.loads((config.run.directory / "config.json").read_text())
    del document["train"]["prune"]
    (config.run.directory / "config.json").write_text(json.dumps(document))
    assert train(config, path) == first
    with pytest.raises(InputError, match=r"train\.prune=None"):
        train(*tiny_config(tmp_path, **PRUNE))


def test_every_checkpoint_is_kept_on_demand(tmp_path: Path) -> None:
    config, path = tiny_config(tmp_path, TRAIN_CHECKPOINT_EVERY=3, TRAIN_KEEP_CHECKPOINTS=True)
    train(config, path)
    steps = config.run.directory / "steps"
    assert sorted(folder.name for folder in steps.iterdir()) == ["3", "6", "8"]
    last, kept = read_tensors(config.run.directory / "checkpoint"), read_tensors(steps / "8")
    assert all(torch.equal(kept[name], last[name]) for name in last)
    earlier = load_state(steps / "3")
    assert earlier is not None and earlier.step == 3
    shutil.rmtree(config.run.directory / "checkpoint")
    train(*tiny_config(tmp_path))  # anew, and without keeping any
    assert not steps.exists()


def test_command_saves_on_sigint_and_says_how_to_continue(tmp_path: Path) -> None:
    path = write_config(tmp_path, TRAIN_STEPS=100_000)
    process = subprocess.Popen(
        [sys.executable, "-m", "gpt2.train", "--config", str(path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step "):
            break
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert f"continue with: python -m gpt2.train --config {path}" in errors
    result = json.loads(output.splitlines()[-1])
    assert result["complete"] is False and result["step"] >= 1
    state = json.loads((tmp_path / "runs/tiny/checkpoint/trainer_state.json").read_text())
    assert state["complete"] is False and state["step"] == result["step"]


def test_finished_run_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, path = tiny_config(tmp_path)
    first = train(config, path)
    written = (config.run.directory / "tier_hints.json").stat().st_mtime_ns
    monkeypatch.setattr(Trainer, "run", lambda self: pytest.fail("trained again"))
    config, path = tiny_config(tmp_path, BENCH_ITERATIONS=7)
    assert train(config, path) == first
    written_config = json.loads((config.run.directory / "config.json").read_text())
    assert written_config["bench"]["iterations"] == 7
    assert "is finished" in capsys.readouterr().err
    assert (config.run.directory / "tier_hints.json").stat().st_mtime_ns == written


def test_finished_run_gives_new_hints_when_their_settings_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, path = tiny_config(tmp_path)
    train(config, path)
    before = load_hints(config.hints_path)
    monkeypatch.setattr(Trainer, "run", lambda self: pytest.fail("trained again"))
    config, path = tiny_config(
        tmp_path, TIERING_FIM_DIAG=True, HINTS_FISHER_SEQUENCES=8, TIERING_HBM_THRESHOLD="0.5"
    )
    train(config, path)
    hints = load_hints(config.hints_path)
    assert hints.provenance["signal"] == "fisher_diag"
    assert hints.provenance["tokens"] == 8 * 16
    assert hints.provenance["thresholds"] == {"hbm": 0.5, "cpu": 0.8}
    assert hints.model == before.model
    diagonal = load_file(config.run.directory / "fisher_diag.safetensors")
    trace = sum(float(diagonal[f"transformer.ln_f.{name}"].sum()) for name in ("weight", "bias"))
    assert hints.blocks["transformer.ln_f"].signals["fisher_trace"] == pytest.approx(trace)


@pytest.mark.parametrize(
    ("symbols", "field"),
    [
        ({"TRAIN_LEARNING_RATE": "0.02"}, "train.learning_rate"),
        ({"GPT2_LAYERS": 1}, "model.layers"),
        ({"RUN_SEED": 8}, "run.seed"),
    ],
)
def test_other_settings_are_refused_by_name(
    tmp_path: Path, symbols: dict[str, Any], field: str
) -> None:
    train(*tiny_config(tmp_path))
    with pytest.raises(InputError, match=rf"{field}=.*RUN_NAME"):
        train(*tiny_config(tmp_path, **symbols))


def test_changed_text_is_refused(tmp_path: Path) -> None:
    config, path = tiny_config(tmp_path, TIERING_GENERATE_JSON=True)
    train(config, path)
    config.hints_path.unlink()
    (tmp_path / "texts" / "0.py").write_text("another text\n" * 50)
    with pytest.raises(InputError, match="another text of files"):
        train(config, path)


def test_second_trainer_in_the_same_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, path = tiny_config(tmp_path)
    run = Trainer.run

    def run_twice(self: Trainer) -> Any:
        with pytest.raises(InputError, match="another process trains"):
            train(config, path)
        return run(self)

    monkeypatch.setattr(Trainer, "run", run_twice)
    assert train(config, path)["complete"]


def test_diverging_loss_stops_and_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = gpt2_trainer.token_losses
    calls = iter(range(1, 100))
    monkeypatch.setattr(
        gpt2_trainer,
        "token_losses",
        lambda *a: losses(*a) * (math.nan if next(calls) == 5 else 1),
    )
    # No evaluation before the last step: the fifth call is the fifth step's.
    config, path = tiny_config(tmp_path, TRAIN_CHECKPOINT_EVERY=3, TRAIN_EVAL_EVERY=100)
    with pytest.raises(FloatingPointError, match=r"step 5: loss nan.*checkpoint of step 3"):
        train(config, path)
    checkpoint = config.run.directory / "checkpoint"
    assert json.loads((checkpoint / "trainer_state.json").read_text())["step"] == 3
    assert all(torch.isfinite(tensor).all() for tensor in read_tensors(checkpoint).values())
    monkeypatch.undo()
    assert train(config, path)["complete"]


def test_full_gpu_names_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpt2_trainer, "token_losses", fail)
    with pytest.raises(InputError, match="TRAIN_BATCH_SIZE=4: halve it and double TRAIN_ACCUM"):
        train(*tiny_config(tmp_path))


@pytest.mark.parametrize("moment", ["writing", "between renames", "before cleaning up"])
def test_crash_while_saving_leaves_a_checkpoint_to_continue_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    config, path = tiny_config(tmp_path, TRAIN_CHECKPOINT_EVERY=3)
    saves = iter(range(1, 100))
    replace = gpt2_checkpoint._replace

    class Crash(BaseException):
        """The process is gone: nothing after it runs."""

    def crashing(folder: Path, partial: Path) -> None:
        if next(saves) == 2:
            old = gpt2_checkpoint._old(folder)
            if moment != "writing":
                folder.rename(old)
            if moment == "before cleaning up":
                partial.rename(folder)
            raise Crash
        replace(folder, partial)

    with monkeypatch.context() as patch:
        patch.setattr(gpt2_checkpoint, "_replace", crashing)
        with pytest.raises(Crash):
            train(config, path)
    steps = []
    run = Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self: (steps.append(self.state.step), run(self))[1])
    assert train(config, path)["complete"]
    assert steps == [6 if moment == "before cleaning up" else 3]
    assert sorted(p.name for p in config.run.directory.glob("*checkpoint*")) == ["checkpoint"]


def test_full_disk_is_said_plainly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, path = tiny_config(tmp_path, TRAIN_CHECKPOINT_EVERY=3)
    save_file = gpt2_checkpoint.save_file
    calls = iter(range(100))

    def fail(*args: Any, **options: Any) -> None:
        if next(calls) >= 3:  # three files a checkpoint: the second checkpoint fails
            raise gpt2_checkpoint.SafetensorError(
                "Error while serializing: I/O error: No space left on device (os error 28)"
            )
        save_file(*args, **options)

    monkeypatch.setattr(gpt2_checkpoint, "save_file", fail)
    with pytest.raises(OSError, match=r"disk of .* is full.*last good checkpoint is untouched"):
        train(config, path)
    assert not list(config.run.directory.glob(".checkpoint*"))
    state = gpt2_checkpoint.load_state(config.run.directory / "checkpoint")
    assert state is not None and state.step == 3


def test_damaged_checkpoint_is_an_input_error(tmp_path: Path) -> None:
    config, path = tiny_config(tmp_path)
    train(config, path)
    config.hints_path.unlink()
    file = config.run.directory / "checkpoint" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"optimizer.safetensors is damaged.*delete the folder"):
        train(config, path)


def test_continues_from_pretrained_weights(tmp_path: Path) -> None:
    config, path = tiny_config(tmp_path)
    first = train(config, path)
    checkpoint = config.run.directory / "checkpoint"
    config, path = tiny_config(
        tmp_path, RUN_NAME="tuned", GPT2_PRETRAINED=str(checkpoint), TRAIN_LEARNING_RATE="0.0001"
    )
    tuned = train(config, path)
    assert tuned["heldout_loss_nats"] == pytest.approx(first["heldout_loss_nats"], abs=0.05)


@pytest.mark.parametrize(
    ("symbols", "message"),
    [
        ({"GPT2_PRETRAINED": "none/of/these"}, "can't be loaded"),
        ({"DATA_FILES_GLOB": "/no/such/*.txt"}, "matches no file"),
        ({"RUN_OUTPUT_DIR": "/dev/null/runs"}, "RUN_OUTPUT_DIR"),
        ({"TIERING_JSON_OUTPUT": "/dev/null/hints.json"}, "can't be written"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], symbols: dict[str, Any], message: str
) -> None:
    path = write_config(tmp_path, **symbols)
    assert run_main(lambda: main(["--config", str(path)])) == 2
    errors = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("error: ") for line in errors) == 1
    assert message in errors[-1]


def test_learning_rate_warms_up_and_ends_at_its_minimum(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, TRAIN_STEPS=100, TRAIN_WARMUP_STEPS=10)[0].train
    rates = [learning_rate(step, config) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.001)
    assert max(rates) == rates[9] == pytest.approx(0.01)
    assert rates[-1] == pytest.approx(0.001)
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_damaged_hints_of_a_finished_run_are_made_again(tmp_path: Path) -> None:
    config, path = tiny_config(tmp_path)
    train(config, path)
    good = load_hints(config.hints_path)
    config.hints_path.write_text("garbage")
    train(config, path)
    assert load_hints(config.hints_path).blocks == good.blocks


@pytest.mark.parametrize(
    "name",
    ["checkpoint", "checkpoint/tier_hints.json", "config.json", "../tiny/checkpoint/hints.json"],
)
def test_hints_where_the_run_writes_are_refused_before_training(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="TIERING_JSON_OUTPUT"):
        train(*tiny_config(tmp_path, TIERING_JSON_OUTPUT=name))
    assert not (tmp_path / "runs/tiny/metrics.jsonl").exists()


def test_hints_outside_the_run_folder_are_not_discarded(tmp_path: Path) -> None:
    config, _ = tiny_config(tmp_path, TIERING_JSON_OUTPUT="../shared.json")
    config.run.directory.mkdir(parents=True)
    config.hints_path.write_text("another run's")
    RunDirectory(config).discard_results()
    assert config.hints_path.read_text() == "another run's"


def test_more_vocabulary_than_the_text_gives_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"GPT2_VOCAB_SIZE=5000, but .* only \d+ tokens"):
        train(*tiny_config(tmp_path, GPT2_VOCAB_SIZE=5000))


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_damaged_weights_are_an_input_error(
    tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, path = tiny_config(tmp_path)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        train(config, path)
    weights = config.run.directory / "checkpoint" / file
    weights.write_bytes(weights.read_bytes()[:50])
    with pytest.raises(InputError, match=r"checkpoint .* is damaged"):
        train(config, path)
