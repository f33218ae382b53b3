"""verify_epsilon.py on a tiny GPT-2 with measured curves, end to end."""

import json
from pathlib import Path

import pytest
import torch
from test_collect_fisher import byte_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from lib.blocks import parameter_digest, partition_model
from lib.commands.cli import run_main
from lib.hints import BlockHint, Hints, ModelInfo, save_hints
from lib.precision.perturb import lossy_blocks
from lib.precision.quality import measure_perturbations
from lib.vocabulary import Precision, Tier
from scripts.experiments.epsilon import verify_epsilon

LADDER = [Precision.INT8, Precision.INT6, Precision.INT4, Precision.INT3, Precision.INT2]


def save_model(folder: Path) -> Path:
    """A model whose weights are large enough that precision costs something; and its hints."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2,
        n_head=2,
        n_embd=64,
        n_positions=32,
        vocab_size=258,
        bos_token_id=257,
        eos_token_id=257,
        initializer_range=0.1,
    )
    model = GPT2LMHeadModel(config).eval()
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    pairs = [(block.name, p) for p in LADDER for block in lossy_blocks(model, p)]
    tokens = torch.randint(32, 127, (8, 32))
    kl = measure_perturbations(model, [tokens], [{name: p} for name, p in pairs])
    curves: dict[str, dict[Precision, float]] = {}
    for (name, precision), quality in zip(pairs, kl, strict=True):
        curves.setdefault(name, {})[precision] = quality.kl_nats
    info = ModelInfo(
        id="tiny",
        revision="",
        class_name="GPT2LMHeadModel",
        parameter_digest=parameter_digest(model),
    )
    hints = Hints(
        model=info,
        provenance={"signal": "fisher_trace", "created": "2026-01-01T00:00:00+00:00"},
        quality={
            "epsilon_kl": 0.1,
            "calibrated": True,
            "conformal_factor": 1.3,
            "conformal_probes": 60,
            "kernels": {"name": "any", "nats": 1e-4},
        },
        blocks={
            block.name: BlockHint(
                tier=Tier.HBM,
                importance=1.0,
                rank=1,
                num_bytes=block.num_bytes,
                num_params=block.num_params,
                kl=curves.get(block.name, {}),
            )
            for block in partition_model(model)
        },
    )
    save_hints(hints, folder / "tier_hints.json")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model(tmp_path_factory.mktemp("model"))
    lines = [f"line {index}: {index**3 % 1009} jumps over {index**2}\n" for index in range(2000)]
    (folder / "text.txt").write_text("".join(lines))
    return folder


def test_the_bound_is_kept_at_every_epsilon(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", str(folder), "--tier-hints", str(folder / "tier_hints.json")]
    flags += [
        "--data",
        str(folder / "text.txt"),
        "--runs",
        "6",
        "--smallest",
        "0.002",
        "--largest",
        "0.3",
    ]
    assert run_main(lambda: verify_epsilon.main(flags)) == 0
    lines = capsys.readouterr().out.splitlines()
    document = json.loads(lines[-1])
    rows = document["rows"]
    assert document["runs"] == len(rows) == 6
    assert document["held"] == sum(row["measured"] <= row["epsilon"] for row in rows) == 6
    assert document["held_by_these_hints"] == document["runs_of_these_hints"] == 3
    assert [row["calibration"] for row in rows] == [0, 1, 0, 1, 0, 1]
    assert [row["epsilon"] for row in rows[::5]] == pytest.approx([0.002, 0.3])
    assert all(0 < row["predicted"] < row["bound"] <= row["epsilon"] for row in rows)
    assert document["intervals_above"] == sum(r["interval"][1] > r["epsilon"] for r in rows)
    for which in (0, 1):
        sizes = [row["bytes"] for row in rows if row["calibration"] == which]
        assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]
    assert document["trivial"] == 0 and all(row["floors_raised"] == 0 for row in rows)
    # No machine has the hints' kernels, so near to what those cost only measured plans stand.
    assert rows[0]["by_ledger"] is None
    assert document["held_by_ledger"] == document["runs_by_ledger"] == 5
    for row in rows[1:]:  # below 3 bits the ledger alone doesn't go
        coarse = "int2" in row["precisions"]
        assert (row["by_ledger"]["measured"] < row["measured"]) == coarse
    own, anew = document["calibrations"]
    assert own["conformal_factor"] == 1.3 and anew["plan_factor"] > 0


def test_wrong_input_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", str(folder), "--tier-hints", str(folder / "tier_hints.json")]
    for more, problem in [
        (["--runs", "0"], "--runs 0 is too few"),
        (["--smallest", "0.4"], "above --largest"),
        (["--largest", "9"], "at most 4"),
    ]:
        arguments = [*flags, *more]
        assert run_main(lambda arguments=arguments: verify_epsilon.main(arguments)) == 2
        assert problem in capsys.readouterr().err


def run_one(folder: Path, hints: Path, *flags: str) -> int:
    arguments = ["--model", str(folder), "--tier-hints", str(hints), "--runs", "1", *flags]
    return run_main(lambda: verify_epsilon.main([*arguments, "--largest", "0.02"]))


def test_a_short_text_is_used_as_far_as_it_goes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text((folder / "text.txt").read_text()[: 33 * 32])
    hints = folder / "tier_hints.json"
    assert run_one(folder, hints, "--smallest", "0.02", "--data", str(text)) == 0
    out, err = capsys.readouterr()
    assert f"{text} holds 33 sequences of 32 tokens, not 288: all are used" in err
    document = json.loads(out.splitlines()[-1])
    names = ("judging_sequences", "canary_sequences", "verdict_sequences")
    assert [document[name] for name in names] == [11, 4, 7]
    text.write_text((folder / "text.txt").read_text()[: 10 * 32])
    assert run_one(folder, hints, "--data", str(text)) == 2
    error = capsys.readouterr().err
    assert "3 sequences of 32 tokens to judge on, fewer than 10: give more text with" in error
    assert "--samples" not in error and "--sequence-length" not in error


def test_floors_that_the_joint_check_raises_are_counted_and_the_ledger_is_judged_without(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hopeful = json.loads((folder / "tier_hints.json").read_text())
    for block in hopeful["blocks"].values():
        block["kl"] = {precision: nats / 4 for precision, nats in block.get("kl", {}).items()}
    hints = tmp_path / "hints.json"
    hints.write_text(json.dumps(hopeful))
    flags = ("--smallest", "0.02", "--data", str(folder / "text.txt"))
    assert run_one(folder, hints, *flags) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    (row,) = document["rows"]
    assert row["held"] and row["floors_raised"] > 0
    assert row["by_ledger"]["measured"] > 0.02 and not row["by_ledger"]["held"]
    assert (document["held"], document["held_by_ledger"]) == (1, 0)


def test_hints_of_another_model_are_refused_before_anything_is_read(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = json.loads((folder / "tier_hints.json").read_text())
    other["model"]["parameter_digest"] = "sha256:" + "0" * 64
    other["quality"]["text"] = {"sequence_length": 128}
    hints = tmp_path / "hints.json"
    hints.write_text(json.dumps(other))
    assert run_one(folder, hints, "--data", str(tmp_path / "no such text")) == 2
    error = capsys.readouterr().err
    assert "digest" in error and "--sequence-length" not in error and "no file" not in error
