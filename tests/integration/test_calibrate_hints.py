"""tierhints calibrate and tierhints evaluate on a tiny trained run, end to end."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from gpt2.train import main as train
from lib.commands import calibrate as calibrate_hints
from lib.commands import evaluate
from lib.errors import InputError
from lib.evaluation import calibrate as calibration
from lib.hints import load_hints
from lib.precision.floors import read_trust
from lib.vocabulary import Precision
from tests.integration.tiny_run import write_config

SIGNALS = {"adam", "fisher_empirical", "fisher_true", "directional", "magnitude", "random"}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Run:
    checkpoint: Path
    hints: Path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("calibrate")
    config = write_config(folder, GPT2_WIDTH=64, GPT2_CONTEXT=16, DATA_HELDOUT_PERMILLE=400)
    assert train(["--config", str(config)]) == 0
    run = next(folder.rglob("tier_hints.json")).parent
    return Run(run / "checkpoint", run / "tier_hints.json")


@pytest.fixture
def run(trained: Run, tmp_path: Path) -> Run:
    """Return a copy whose hints may be changed."""
    return Run(trained.checkpoint, Path(shutil.copy(trained.hints, tmp_path)))


def call(main: Any, capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main([str(argument) for argument in arguments]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_oracle_judges_every_signal(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    document = call(
        calibrate_hints.main,
        capsys,
        *("--model", run.checkpoint, "--tier-hints", run.hints, "--oracle", "--draws", 64),
    )
    assert document["spearman"].keys() == SIGNALS and document["missing"] == {}
    assert document["spearman"]["fisher_true"] > 0.9 > abs(document["spearman"]["random"])
    assert document["within_precision"].keys() == {
        *("bf16", "int8", "int6", "int5", "int4", "int3", "int2")
    }
    assert len(document["probes"]) == document["pairs"] == 7 * 6  # wte, wpe, 2 attn, 2 mlp
    for row in document["additivity"]:
        assert 0.3 < row["joint_over_sum"] < 3, row
    hints = load_hints(run.hints)
    quality = hints.quality
    assert read_trust(quality).factor == quality["conformal_factor"] > 0.5
    assert quality["conformal_factor"] == max(quality["pair_factor"], quality["plan_factor"])
    assert quality["exhaustive"] and quality["conformal_probes"] == 42
    assert len(document["plan_ratios"]) == 63 and quality["kernels"]["nats"] > 0
    parts = [document["text"][f"{part}_sequences"] for part in ("fisher", "calibration", "judging")]
    assert sum(parts) >= 6 and max(parts) - min(parts) <= 1
    curve = hints.blocks["transformer.h.0.mlp"].kl
    assert list(curve) == list(Precision)[1:2] + list(Precision)[3:]
    assert list(curve.values()) == sorted(curve.values())
    assert set(hints.blocks["transformer.ln_f"].kl.values()) == {0.0}
    # What was measured lies by what the file says.
    for row in document["probes"]:
        said = hints.blocks[row["block"]].kl[Precision(row["precision"])]
        assert 0.2 < row["kl"] / said < 5, row


def test_without_moments_adam_is_missing_and_says_so(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(run.checkpoint, bare, ignore=shutil.ignore_patterns("optimizer*", "heldout*"))
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {index} of text, number {index**2}\n" for index in range(3000)))
    output = tmp_path / "calibrated.json"
    document = call(
        calibrate_hints.main,
        capsys,
        *("--model", bare, "--tier-hints", run.hints, "--data", text, "--output", output),
        *("--draws", 16, "--samples", 17),
    )
    assert "optimizer.safetensors" in document["missing"]["adam"]
    assert document["text"]["source"] == str(text)
    names = ("fisher_sequences", "calibration_sequences", "judging_sequences")
    assert [document["text"][name] for name in names] == [6, 6, 5]
    assert load_hints(output).quality["calibrated"] is True
    assert load_hints(run.hints).quality == {}


def test_a_large_factor_is_warned_of(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "LARGEST_TRUSTED_FACTOR", 0.01)
    arguments = ["--model", str(run.checkpoint), "--tier-hints", str(run.hints), "--draws", "8"]
    assert calibrate_hints.main(arguments) == 0
    assert "WARNING: predictions say little" in capsys.readouterr().out
    assert load_hints(run.hints).quality["trustworthy"] is False


def test_wrong_input_is_refused(run: Run, tmp_path: Path) -> None:
    arguments = ["--model", str(run.checkpoint), "--tier-hints"]
    flat = tmp_path / "flat.json"
    flat.write_text('{"transformer": "HBM"}')
    with pytest.warns(UserWarning), pytest.raises(InputError, match="flat"):
        calibrate_hints.main([*arguments, str(flat)])
    with pytest.raises(InputError, match="--draws: 1 is out of range"):
        calibrate_hints.main([*arguments, str(run.hints), "--draws", "1"])
    with pytest.raises(InputError, match="has 5 sequences .* need two each"):
        calibrate_hints.main([*arguments, str(run.hints), "--samples", "5"])


def test_evaluation_of_the_placed_model(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--model", run.checkpoint, "--tier-hints", run.hints)
    lossless = call(evaluate.main, capsys, *arguments)
    assert lossless["kl_nats"] == 0 and lossless["top1_agreement"] == 1
    assert lossless["perplexity"] == lossless["reference_perplexity"]
    arguments = ("--model", run.checkpoint, "--budget", "HBM=,SSD=", "--precision")
    coarse = call(evaluate.main, capsys, *arguments, "int2")
    fine = call(evaluate.main, capsys, *arguments, "int6")
    assert 0 < fine["kl_nats"] < coarse["kl_nats"]
    assert fine["kl_interval"][0] < fine["kl_nats"] < fine["kl_interval"][1]


def test_evaluation_under_a_bound(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--model", run.checkpoint, "--tier-hints", run.hints)
    with pytest.raises(InputError, match="tierhints calibrate"):
        evaluate.main([*map(str, arguments), "--epsilon", "0.02"])
    call(calibrate_hints.main, capsys, *arguments, "--draws", 32)
    document = call(evaluate.main, capsys, *arguments, "--epsilon", "ppl=1.02")
    assert 0 < document["predicted_nats"] < document["bound_nats"] <= 0.02
    assert 0 < document["kl_nats"] <= 0.02
    assert sum(document["precisions"].values()) > 1
    with pytest.raises(InputError, match="not a quality bound"):
        evaluate.main([*map(str, arguments), "--epsilon", "ppl=0.5"])


def test_evaluation_says_what_is_missing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="--budget"):
        evaluate.main(["--model", str(run.checkpoint)])
    monkeypatch.setattr(evaluate, "HARNESS", "a_package_that_is_not_there")
    with pytest.raises(InputError, match="pip install lm_eval"):
        evaluate.main(
            ["--model", str(run.checkpoint), "--tier-hints", str(run.hints), "--tasks", "piqa"]
        )


def test_a_short_text_is_used_as_far_as_it_goes(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    arguments = ["--model", str(run.checkpoint), "--tier-hints", str(run.hints)]
    arguments += ["--data", str(text)]
    text.write_text("".join(f"line {index} of text\n" for index in range(60)))
    assert evaluate.main(arguments) == 0
    printed = capsys.readouterr()
    count = json.loads(printed.out.splitlines()[-1])["sequences"]
    assert 6 <= count < 64
    note = f"{text} holds {count} sequences of 16 tokens, not 64: all are used"
    assert note in printed.err.splitlines()
    document = call(calibrate_hints.main, capsys, *arguments, "--draws", 8)
    parts = [document["text"][f"{part}_sequences"] for part in ("fisher", "calibration", "judging")]
    assert sum(parts) == count
    text.write_text("too short")
    with pytest.raises(InputError, match="has 0 sequences of 16 tokens, and an interval needs 2"):
        evaluate.main(arguments)
    with pytest.raises(InputError, match="has 0 sequences of 16 tokens, .* need two each"):
        calibrate_hints.main(arguments)


def test_tasks_run_on_the_placed_model(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "docs.jsonl").write_text(
        "".join(json.dumps({"text": f"line {i} of text " * 4}) + "\n" for i in range(6))
    )
    (tmp_path / "local.yaml").write_text(
        "task: local_text\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/docs.jsonl}}}}\n"
        "output_type: loglikelihood_rolling\n"
        "test_split: test\n"
        'doc_to_text: ""\n'
        'doc_to_target: "{{text}}"\n'
        "metric_list:\n  - metric: word_perplexity\n"
    )
    document = call(
        evaluate.main,
        capsys,
        *("--model", run.checkpoint, "--budget", "HBM=,SSD=", "--precision", "int2", "--limit", 4),
        *("--tasks", "local_text", "--task-folder", tmp_path),
    )
    full, ours = (document["tasks"][part]["local_text"] for part in ("full", "ours"))
    assert full.keys() == ours.keys()
    assert ours["word_perplexity,none"] != full["word_perplexity,none"] > 1


def test_a_checkpoint_in_bf16_is_calibrated(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(run.checkpoint, tmp_path / "bf16"))
    AutoModelForCausalLM.from_pretrained(copy, dtype=torch.bfloat16).save_pretrained(copy)
    document = call(
        calibrate_hints.main,
        capsys,
        *("--model", copy, "--tier-hints", run.hints, "--oracle", "--draws", 16),
    )
    assert "bf16" not in document["within_precision"]
    assert all(row["kl"] > 0 for row in document["probes"])
    hints = load_hints(run.hints)
    assert hints.blocks["transformer.h.0.mlp"].kl[Precision.BF16] == 0
