"""The scripts that put the signal to use, on a tiny run: arms that differ in one thing only."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_run import tiny_config, write_config

from gpt2.train import train
from lib.commands import rank_layers
from lib.config import load_config
from lib.errors import InputError
from lib.kconfig import read_assignments
from lib.vocabulary import Precision
from scripts.experiments.kv_cache import compare_kv_cache
from scripts.experiments.kv_cache.compare_kv_cache import BITS, allocate_bits, spearman
from scripts.experiments.pruning import compare_pruning, pruning_runs
from scripts.experiments.pruning.compare_pruning import SCHEDULES

ROOT = Path(__file__).resolve().parents[2]


def test_pruning_scores_are_compared_on_equal_terms(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(pruning_runs.QUICK, "TRAIN_STEPS", 16)
    config = write_config(tmp_path, TRAIN_PRUNE=True)
    options = ["--config", str(config), "--work-dir", str(tmp_path / "work"), "--jobs", "1"]
    options += ["--schedules", "50-90"]
    assert compare_pruning.main([*options, "--seeds", "2", "--quick"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"ours", "magnitude", "random", "dense"} <= result["sparsity"]["0.5"].keys()
    assert result["sparsity"]["0.5"]["n"] == 2
    gradual = result["gradual"]["50-90"]
    for table in (gradual, result["one_shot"]):
        row = table["0.5"]
        assert row["n"] == 2 and all(len(values) == 2 for values in row["per_seed"].values())
        means = row["perplexity"]
        assert means["magnitude"] == min(means["magnitude_matrix"], means["magnitude_global"])
    # Training and one-shot evaluation measure the dense network alike.
    dense = [table["0.5"]["per_seed"]["dense"] for table in (gradual, result["one_shot"])]
    assert dense[0] == pytest.approx(dense[1], rel=1e-4)

    runs = tmp_path / "work" / "quick"
    for run in runs.iterdir():
        zeros = load_file(run / "checkpoint/model.safetensors")["transformer.h.0.mlp.c_fc.weight"]
        share = float((zeros == 0).float().mean())
        assert share == 0 if "dense" in run.name else share > 0.1
        assigned = read_assignments(run / ".config")
        free = ("TRAIN_PRUNE", "RUN_", "TRAIN_CHECKPOINT_EVERY", "TRAIN_KEEP_CHECKPOINTS")
        different = {n for n in assigned if n.startswith(free)}
        same = {n: a.value for n, a in assigned.items() if n not in different}
        other = read_assignments(runs / "seed7-dense" / ".config")
        assert same == {n: a.value for n, a in other.items() if not n.startswith(free)}
    arm = runs / "seed7-ours-0.5-50-90"
    assert len((arm / "metrics.jsonl").read_text().splitlines()) == 17  # of 16 steps, 1 evaluation

    # What branched off the dense run is what training from the start gives, bit for bit.
    path = tmp_path / "whole.config"
    path.write_text((arm / ".config").read_text().replace(arm.name, "whole"))
    train(load_config(path), path)
    weights, whole = (
        load_file(runs / name / "checkpoint/model.safetensors") for name in (arm.name, "whole")
    )
    assert all(torch.equal(weights[name], whole[name]) for name in whole)


def test_the_first_schedule_compared_is_the_default() -> None:
    prune = load_config(ROOT / "defconfigs" / "gpt2-pruning").train.prune
    assert prune is not None
    assert (prune.start_step, prune.end_step) == tuple(10 * pct for pct in SCHEDULES[0])


def test_pruning_comparison_refuses_what_it_cannot_answer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--seeds 1: at least 2"):
        compare_pruning.main(["--seeds", "1"])
    with pytest.raises(InputError, match=r"--sparsities 1\.5"):
        compare_pruning.main(["--sparsities", "1.5"])
    with pytest.raises(SystemExit):
        compare_pruning.main(["--schedules", "90-60"])


def test_cache_choices_are_compared_and_layers_ranked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, path = tiny_config(tmp_path)
    train(config, path)
    checkpoint = str(config.run.directory / "checkpoint")
    capsys.readouterr()
    assert compare_kv_cache.main(["--model", checkpoint, "--sequences", "6"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    for table, keys in (("keep_full", {"1"}), ("mixed", {"3", "4"})):
        assert set(result[table]) == keys
        for row in result[table].values():
            assert {"ours", "reverse", "random"} <= row["kl"].keys()
            sizes = [value["mean"] for value in row["bytes_per_token"].values()]
            assert max(sizes) == pytest.approx(min(sizes), rel=1e-6)
    kl = [result["uniform"][str(level)]["kl"]["uniform"]["mean"] for level in BITS]
    assert kl[0] > kl[-1] > 0

    output = tmp_path / "layers.json"
    assert rank_layers.main(["--model", checkpoint, "--output", str(output)]) == 0
    document = json.loads(output.read_text())
    traces = [entry["fisher_trace"] for entry in document["layers"]]
    assert traces == sorted(traces)
    assert document["cheapest_first"] == [entry["layer"] for entry in document["layers"]]
    assert {entry["block"] for entry in document["layers"]} == {
        f"transformer.h.{i}.attn" for i in range(2)
    }


@settings(max_examples=30, deadline=None)
@given(
    scales=st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=4),
    bits=st.sampled_from([2, 3, 4, 6]),
)
def test_allocation_spends_the_budget_and_is_the_best(scales: list[float], bits: int) -> None:
    from itertools import product

    costs = [{level: scale * 4.0**-n for level, n in BITS.items()} for scale in scales]

    def damage(choice: tuple[Precision | None, ...]) -> float:
        return sum(c[level] for c, level in zip(costs, choice, strict=True) if level)

    chosen = allocate_bits(costs, bits)
    assert sum(BITS[level] for level in chosen if level) == bits * len(scales)
    every = (c for c in product(BITS, repeat=len(scales)) if sum(map(BITS.get, c)) == bits * len(c))  # type: ignore[arg-type]
    assert damage(chosen) == pytest.approx(min(map(damage, every)))


def test_spearman_is_that_of_ranks() -> None:
    assert spearman([1, 2, 30], [0.1, 5, 6]) == pytest.approx(1)
    assert spearman([3, 2, 1], torch.tensor([1.0, 2, 3]).tolist()) == pytest.approx(-1)
