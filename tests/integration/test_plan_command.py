"""tierhints plan and tierhints what-if from the command line to what they print and write."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lib.blocks import partition_model
from lib.checkpoint.load import build_empty_model
from lib.commands import plan, what_if
from lib.commands.cli import run_main
from lib.hints import ModelInfo, build_hints, load_hints, save_hints
from lib.machine import MachineProfile, TierSpec, save_machine
from lib.vocabulary import Precision, Tier

MIB = 2**20


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("machine") / "machine.json"
    tiers = {
        Tier.HBM: TierSpec("HBM", 1.0, 10.0),
        Tier.CPU: TierSpec("CPU", 10.0, 8.0),
        Tier.SSD: TierSpec("SSD", 100.0, 1.0),
    }
    profile = MachineProfile(name="toy", tiers=tiers, compute={"fp32": 5e9}, measured=True)
    save_machine(profile, path)
    return path


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config.json alone: about 23 MiB of weights that don't exist."""
    folder = tmp_path_factory.mktemp("gpt2")
    GPT2Config(n_layer=6, n_embd=256, n_head=4, vocab_size=5000).save_pretrained(folder)
    return folder


def run(
    script: Any, capsys: pytest.CaptureFixture[str], *flags: object
) -> tuple[int, str, Any, str]:
    """Exit code, table, document (None without one) and stderr."""
    code = run_main(lambda: script.main([str(flag) for flag in flags]))
    printed, errors = capsys.readouterr()
    *table, last = printed.splitlines() or [""]
    return code, "\n".join(table), json.loads(last) if code == 0 else None, errors


def test_a_budget_is_divided_for_exact_output(
    gpt2: Path, machine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", gpt2, "--machine", machine, "--budget", "HBM=14MiB,SSD=", "--exact"]
    code, table, document, _ = run(plan, capsys, *flags)
    exact = document["exact"]
    assert code == 0 and document["precision"] == "lossless"
    assert exact["precision"] == "int8" and exact["acceptance"] is None  # nothing predicts it
    assert exact["draft_bytes"] + exact["full_bytes"] <= 14 * MIB
    assert exact["full_bytes"] == document["predicted"]["peak_fast_bytes"]
    assert exact["draft_ms"] < exact["pass_ms"] and 1 <= exact["window"] <= 31
    assert "unknown, 0.9 taken" in table and "tokens/s predicted" in table
    code, _, narrow, _ = run(plan, capsys, *flags, "--precision", "int4")
    assert code == 0 and narrow["exact"]["precision"] == "int4"
    assert narrow["exact"]["draft_bytes"] < exact["draft_bytes"]
    code, _, _, errors = run(plan, capsys, *flags[:-3], "--budget", "HBM=2MiB,SSD=", "--exact")
    assert code == 2 and "the smallest that works is HBM=" in errors


def test_a_plan_is_printed_and_written_as_json(
    gpt2: Path, machine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", gpt2, "--machine", machine, "--budget", "HBM=14MiB,SSD="]
    code, table, document, _ = run(plan, capsys, *flags, "--json", tmp_path / "plan.json")
    assert code == 0
    assert json.loads((tmp_path / "plan.json").read_text()) == document
    for words in ("attention", "SSD weights", "peak fast memory", "physical limit", "of 14.0 MiB"):
        assert words in table
    predicted = document["predicted"]
    assert document["smallest_hbm_bytes"] < predicted["peak_fast_bytes"] <= 14 * MIB
    assert 0 < document["limit_ms_per_token"] < predicted["ms_per_token"]
    assert predicted["tokens_per_s"] == pytest.approx(1e3 / predicted["ms_per_token"])
    assert document["plan"]["bytes_per_tier"]["SSD"] > 8 * MIB
    names = set(document["plan"]["placements"])
    assert {"transformer.wte", "transformer.h.5.mlp"} <= names

    _, blocks, same, _ = run(plan, capsys, *flags, "--blocks")
    assert same == document
    assert all(name in blocks for name in names)


def test_fewer_bits_are_faster_within_the_same_budget(
    gpt2: Path, machine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", gpt2, "--machine", machine, "--budget", "HBM=24MiB,SSD="]
    _, _, lossless, _ = run(plan, capsys, *flags)
    _, table, int8, _ = run(plan, capsys, *flags, "--precision", "int8")
    assert int8["weight_bytes"] < 0.3 * lossless["weight_bytes"]
    assert "int8" in table


def test_a_budget_that_is_too_small_names_one_that_works(
    gpt2: Path, machine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", gpt2, "--machine", machine]
    code, _, _, errors = run(plan, capsys, *flags, "--budget", "HBM=1MiB,SSD=")
    assert code == 2
    size = errors.split("works is HBM=")[1].split()[0]
    code, _, document, _ = run(plan, capsys, *flags, "--budget", f"HBM={size},SSD=")
    assert code == 0
    assert document["plan"]["bytes_per_tier"]["SSD"] > 15 * MIB


@pytest.mark.parametrize(
    "flags, problem",
    [
        (["--budget", "HBM"], "'HBM' is not TIER=SIZE"),
        (["--budget", "HBM=1GiB,HBM=2GiB"], "names HBM twice"),
        (["--budget", "HBM=1parsec"], "1parsec"),
        (["--budget", "DISK=1GiB"], "unknown tier 'DISK'"),
        (["--budget", "SSD="], "no HBM"),
        (["--budget", "HBM=1GiB,CXL="], "names CXL, of which the machine"),
        (["--budget", "HBM=1GiB", "--model", "nowhere"], "nowhere"),
        (["--budget", "HBM=1GiB", "--machine", "nowhere.json"], "nowhere.json"),
        (["--budget", "HBM=1GiB", "--tier-hints", "nowhere.json"], "nowhere.json"),
    ],
)
def test_wrong_flags_exit_with_two_and_one_line(
    flags: list[str],
    problem: str,
    gpt2: Path,
    machine: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, table, _, errors = run(plan, capsys, "--model", gpt2, "--machine", machine, *flags)
    assert (code, table) == (2, "")
    assert problem in errors
    assert len(errors.splitlines()) == 1


def test_of_a_sharded_checkpoint_only_headers_are_read(
    machine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=1000,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    document = json.loads((tmp_path / "config.json").read_text())
    document.pop("dtype")  # the headers know it
    (tmp_path / "config.json").write_text(json.dumps(document))
    for shard in shards:  # values that no one may look at
        header = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
        shard.write_bytes(shard.read_bytes()[:header].ljust(shard.stat().st_size, b"\xff"))
    flags = ["--model", tmp_path, "--machine", machine, "--budget", "HBM=1MiB,SSD="]
    code, table, found, _ = run(plan, capsys, *flags)
    assert code == 0
    assert "bf16" in table
    expected = sum(parameter.nbytes for parameter in model.parameters())
    assert found["weight_bytes"] == pytest.approx(expected, rel=0.01)

    shards[0].unlink()
    code, _, _, errors = run(plan, capsys, *flags)
    assert code == 2
    assert shards[0].name in errors


def test_a_checkpoint_of_another_shape_is_refused(
    machine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=40)).save_pretrained(
        tmp_path
    )
    GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=40).save_pretrained(tmp_path)
    code, _, _, errors = run(
        plan, capsys, "--model", tmp_path, "--machine", machine, "--budget", "HBM=1MiB,SSD="
    )
    assert code == 2
    assert "wants" in errors


def test_hints_of_the_model_are_matched(
    gpt2: Path, machine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hints = tmp_path / "hints.json"
    flags = ["--model", gpt2, "--machine", machine, "--budget", "HBM=14MiB,SSD="]
    hints.write_text(json.dumps({"transformer": "HBM"}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code, _, _, _ = run(plan, capsys, *flags, "--tier-hints", hints)
        assert code == 0
        hints.write_text(json.dumps({"transformer.h": "HBM"}))
        code, _, _, errors = run(plan, capsys, *flags, "--tier-hints", hints)
    assert code == 2
    assert "have no hint" in errors


@pytest.fixture(scope="module")
def calibrated(gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hints by which 8 bits of a block cost 1e-4 nats, and each bit less 4.5 times as much."""
    blocks = {block.name: block for block in partition_model(build_empty_model(gpt2))}
    hints = build_hints(
        model=ModelInfo(
            id="toy",
            revision="",
            class_name="GPT2LMHeadModel",
            parameter_digest="sha256:" + 64 * "0",
        ),
        provenance={"signal": "adam_exp_avg_sq", "created": "2026-01-01T00:00:00+00:00"},
        num_bytes={name: block.num_bytes for name, block in blocks.items()},
        num_params={name: block.num_params for name, block in blocks.items()},
        density=dict.fromkeys(blocks, 1.0),
        signals={name: {} for name in blocks},
        reasons={},
        hbm_threshold=0.3,
        cpu_threshold=0.6,
    )
    kl = {Precision(f"int{bits}"): 1e-4 * 4.5 ** (8 - bits) for bits in (8, 6, 5, 4, 3, 2)}
    hints = replace(
        hints,
        blocks={name: replace(hint, kl=kl) for name, hint in hints.blocks.items()},
        quality={
            "epsilon_kl": 0.02,
            "calibrated": True,
            "conformal_factor": 1.25,
            "conformal_probes": 60,
            "kernels": {"name": "any", "nats": 0.0},
        },
    )
    path = tmp_path_factory.mktemp("hints") / "hints.json"
    save_hints(hints, path)
    return path


def test_a_plan_under_a_quality_bound_shows_floors_and_what_they_cost(
    gpt2: Path, machine: Path, calibrated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", gpt2, "--machine", machine, "--budget", "HBM=15MiB,SSD="]
    flags += ["--tier-hints", calibrated]
    _, _, lossless, _ = run(plan, capsys, *flags)
    assert lossless["quality"] is None
    code, table, document, _ = run(plan, capsys, *flags, "--epsilon", "0.02")
    assert code == 0
    quality = document["quality"]
    assert 0.015 < quality["bound_nats"] <= quality["epsilon_nats"] == 0.02
    assert quality["predicted_nats"] == pytest.approx(quality["bound_nats"] / 1.25)
    placements = document["plan"]["placements"]
    for name, block in quality["blocks"].items():
        assert placements[name]["precision"] == block["floor"] != "int2"
    assert sum(b["bound_nats"] for b in quality["blocks"].values()) == quality["bound_nats"]
    assert document["weight_bytes"] < 0.5 * lossless["weight_bytes"]
    for words in ("epsilon 0.02", "sum of bounds", "predicted", "blocks by floor", "measure="):
        assert words in table
    # A precision that was asked for holds where it is above the floor.
    _, _, int8, _ = run(plan, capsys, *flags, "--epsilon", "0.02", "--precision", "int8")
    assert int8["quality"]["bound_nats"] < 0.2 * quality["bound_nats"]
    _, _, full, _ = run(plan, capsys, *flags, "--epsilon", "0.02", "--precision", "lossless")
    assert full["quality"]["bound_nats"] == 0


def test_a_bound_without_calibrated_hints_is_refused(
    gpt2: Path, machine: Path, calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", gpt2, "--machine", machine, "--budget", "HBM=14MiB,SSD="]
    code, _, _, errors = run(plan, capsys, *flags, "--epsilon", "0.02")
    assert code == 2 and "--epsilon needs --tier-hints" in errors
    hints = load_hints(calibrated)
    save_hints(replace(hints, quality={}), tmp_path / "hints.json")
    flags += ["--epsilon", "0.02", "--tier-hints", tmp_path / "hints.json"]
    code, _, _, errors = run(plan, capsys, *flags)
    assert code == 2 and "tierhints calibrate" in errors


def test_a_gpu_is_planned_for_without_one(
    gpt2: Path, machine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, table, document, _ = run(
        plan,
        capsys,
        *("--model", gpt2, "--machine", machine, "--device", "cuda"),
        *("--budget", "HBM=10MiB,CPU=5MiB,SSD="),
    )
    assert code == 0
    assert list(document["plan"]["bytes_per_tier"]) == ["HBM", "CPU", "SSD"]
    assert "CPU weights" in table


def test_without_a_machine_file_the_figures_are_said_to_be_defaults(
    gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, table, document, errors = run(plan, capsys, "--model", gpt2, "--budget", "HBM=14MiB,SSD=")
    assert code == 0
    assert document["machine"]["measured"] is False
    assert "tierhints probe" in errors
    assert "not measured" in table


def test_what_if_sweeps_bandwidth_and_budget(
    gpt2: Path, machine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "what_if.png"
    code, table, document, _ = run(
        what_if,
        capsys,
        *("--model", gpt2, "--machine", machine, "--bandwidth", "50,1,7"),
        *("--budgets", "50%,1MiB,110%", "--plot", picture),
    )
    assert code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    rates: dict[str, list[float]] = {}
    for row in document["rows"]:
        rates.setdefault(row["budget"], []).append(row["tokens_per_s"])
    assert list(rates) == ["1MiB", "50%", "110%"]
    assert rates["1MiB"] == [None] * 3
    assert rates["50%"] == sorted(rates["50%"])
    assert rates["50%"][0] < 0.5 * rates["50%"][-1]
    for slow, fast in zip(rates["50%"], rates["110%"], strict=True):
        assert slow <= fast * 1.001
        assert fast == pytest.approx(document["resident_tokens_per_s"])
    assert "the smallest budget that works" in table


@pytest.mark.parametrize(
    "flags, problem",
    [
        (["--bandwidth", "1,fast"], "'fast' is not a bandwidth"),
        (["--bandwidth", "-1"], "'-1' is not a bandwidth"),
        (["--budgets", "half"], "half"),
        (["--tier", "CXL"], "give --setup-us"),
        (["--budgets", "1KiB", "--plot", "a.png"], "nothing to draw"),
    ],
)
def test_what_if_refuses_what_it_cannot_sweep(
    flags: list[str],
    problem: str,
    gpt2: Path,
    machine: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, _, errors = run(what_if, capsys, "--model", gpt2, "--machine", machine, *flags)
    assert code == 2
    assert problem in errors


def test_a_tier_that_the_machine_lacks_is_supposed(
    gpt2: Path, machine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, document, _ = run(
        what_if,
        capsys,
        *("--model", gpt2, "--machine", machine, "--tier", "CXL", "--setup-us", "2"),
        *("--bandwidth", "400", "--budgets", "50%"),
    )
    assert code == 0
    assert document["setup_us"] == 2
    assert document["rows"][0]["tokens_per_s"] > 0
