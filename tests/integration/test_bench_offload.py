"""The offload benchmark: its checkpoint, its figures, and a quick run from end to end."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lib.errors import InputError
from lib.report.offload_plots import plot_offload
from scripts.experiments.offload import bench_offload
from scripts.experiments.offload.checkpoint import make_checkpoint
from scripts.experiments.offload.decode import Recorder, TokenTimes, plan_passes
from scripts.experiments.offload.figures import (
    add_ratios,
    compare_to_resident,
    summarize_run,
    table,
)
from scripts.experiments.offload.page_cache import drop_page_cache
from scripts.experiments.offload.runner import Runner
from scripts.experiments.offload.settings import CPU_SETTING
from scripts.experiments.offload.shapes import GPT2Shape

SHAPE = GPT2Shape(layers=2, width=16, heads=2, vocab_size=50, context=32)


def make_interval(seconds: float, num_bytes: int, segment: int, *, timed: bool = True) -> Any:
    return {
        "seconds": seconds,
        "disk_bytes": 2 * num_bytes,
        "moved_bytes": num_bytes,
        "segment": segment,
        "timed": timed,
    }


def make_run(name: str, limit: int | None, rate: float | None, *, peer: bool = False) -> Any:
    return {
        "name": name,
        "label": name,
        "peer": peer,
        "limit_mib": limit,
        "survived": rate is not None,
        "reason": None if rate else "killed by the limit",
        "tokens_per_s": {"median": rate, "p95": rate, "n": 6 if rate else 0},
        "ttft_s": rate,
        "peak_mib": 500.0,
        "peak_anon_mib": 400.0,
        "bytes_per_token": 2**20 if rate else None,
        "link_utilisation": 0.97 if rate else None,
        "attainable_utilisation": 0.99 if rate else None,
        "limit_tokens_per_s": rate,
        "match": None,
    }


RUNS = [
    ("resident", None, 10.0, False),
    ("ours-lossless", 1500, 6.0, False),
    ("transformers", 1500, 2.0, True),
    ("accelerate", 1500, 0.5, True),
    ("ours-int4", 600, 30.0, False),
    ("transformers", 600, 1.0, True),
    ("accelerate", 600, None, True),
]


def make_runs() -> list[Any]:
    return [make_run(name, limit, rate, peer=peer) for name, limit, rate, peer in RUNS]


def test_the_checkpoint_is_a_gpt2_that_transformers_loads(tmp_path: Path) -> None:
    folder = make_checkpoint(SHAPE, tmp_path)
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.lm_head.weight is model.transformer.wte.weight
    assert sum(4 * weight.numel() for weight in model.parameters()) == SHAPE.num_bytes()
    weights = torch.cat([weight.detach().flatten() for weight in model.transformer.h.parameters()])
    assert 0.01 < weights[weights < 0.5].std() < 0.03
    assert (model.transformer.h[0].mlp.c_fc.bias != 0).all()


def test_the_checkpoint_is_made_once_and_the_same(tmp_path: Path) -> None:
    folder = make_checkpoint(SHAPE, tmp_path / "a")
    path = folder / "model.safetensors"
    before = path.stat().st_mtime_ns, path.read_bytes()
    assert make_checkpoint(SHAPE, tmp_path / "a") == folder
    assert (path.stat().st_mtime_ns, path.read_bytes()) == before
    again = make_checkpoint(SHAPE, tmp_path / "b")
    assert (again / "model.safetensors").read_bytes() == before[1]


@pytest.mark.parametrize(
    ("num_timed", "num_passes", "pauses"),
    [(2, 5, [0, 2]), (6, 13, [0, 2, 4, 6, 8, 10]), (12, 19, [0, 3, 6, 9, 12, 15])],
)
def test_tokens_after_a_pause_are_not_timed(
    num_timed: int, num_passes: int, pauses: list[int]
) -> None:
    assert plan_passes(num_timed) == (num_passes, pauses)
    asked: list[int] = []
    passes: list[int] = []
    recorder = Recorder(
        torch.zeros(num_passes, 3),
        pauses=pauses,
        on_pause=lambda: asked.append(len(recorder.intervals)),
        moved_bytes=lambda: 10 * sum(passes),
    )
    recorder.start()
    for index in range(num_passes):
        passes.append(1)
        recorder(torch.zeros(1, index + 1), torch.full((1, 3), float(index)))
    assert asked == [pause + 1 for pause in pauses]
    untimed = [index for index, interval in enumerate(recorder.intervals) if not interval.timed]
    assert untimed == [0, *asked]
    assert [interval.segment for interval in recorder.intervals] == [
        sum(pause < index for pause in pauses) for index in range(num_passes)
    ]
    assert recorder.logits_SV[:, 0].tolist() == list(range(num_passes))
    moved = [interval.moved_bytes for interval in recorder.intervals if interval.timed]
    assert sum(moved) == 10 * num_timed and moved.count(0) == num_timed - len(pauses)


def test_figures_of_a_run() -> None:
    intervals = [
        make_interval(9.0, 10**9, 0, timed=False),
        make_interval(0.5, 10**9, 1, timed=False),
        *[make_interval(0.5, 9 * 10**8, 1)] * 3,
        *[make_interval(1.0, 9 * 10**8, 2)] * 2,
    ]
    result = {
        "intervals": intervals,
        "counted_by": "runtime",
        "link_bytes_per_s": [1e9, 3e9, 1e9],
        "load_seconds": 4.0,
    }
    figures = summarize_run([result], compute_seconds=0.1)
    assert figures["tokens_per_s"] == {"median": 2.0, "p95": 1.0, "n": 5}
    assert figures["ttft_s"] == 9.0
    assert figures["bytes_per_token"] == 9 * 10**8
    assert figures["link_utilisation"] == pytest.approx(5 * 0.9e9 / (3.5 * 2e9))
    assert figures["limit_tokens_per_s"] == pytest.approx(2e9 / 0.9e9)
    compute_bound = summarize_run([result], compute_seconds=2.0)
    assert compute_bound["limit_tokens_per_s"] == 0.5
    assert figures["attainable_utilisation"] is None
    contention = {"slowdown": 0.5, "link_share": 0.8}
    shared = summarize_run([result], compute_seconds=0.1, contention=contention)
    assert shared["attainable_utilisation"] == pytest.approx(0.45 / (0.45 + 0.2 * 0.15))
    computing = summarize_run([result], compute_seconds=2.0, contention=contention)
    assert computing["attainable_utilisation"] == pytest.approx(0.45 / 3.0)
    disk = summarize_run([{**result, "counted_by": "disk reads"}], compute_seconds=None)
    assert disk["bytes_per_token"] == 2 * 9 * 10**8
    by_design = {**result, "counted_by": "weights per pass", "bytes_per_pass": 10**9}
    figures = summarize_run([by_design], compute_seconds=0.1)
    assert figures["link_utilisation"] == pytest.approx(5 * 1e9 / (3.5 * 2e9))
    unknown = summarize_run([{**result, "counted_by": None}], compute_seconds=0.1)
    assert unknown["bytes_per_token"] is unknown["link_utilisation"] is None
    assert unknown["limit_tokens_per_s"] is None and unknown["link_gb_s"] == 2.0


def test_ratios_are_to_the_best_peer_that_survived() -> None:
    runs = make_runs()
    ratios = add_ratios(runs)
    assert ratios == {
        "lossless_1500": 3.0,
        "lossless_1100": None,
        "int8_900": None,
        "int4_600": 30.0,
        "int8_vs_resident": None,
        "int4_vs_resident": 3.0,
    }
    assert runs[1]["ratio_to_accelerate"] == 12.0
    assert runs[4]["ratio_to_accelerate"] is None
    text = table(runs)
    assert len(text.splitlines()) == 2 + len(runs)
    assert "killed by the limit" in text.splitlines()[-1]


def test_what_drafts_is_timed_as_a_whole_and_compared_limit_by_limit() -> None:
    logits_SV = torch.zeros(5, 2)
    moved = iter((0, 7, 70))
    times = TokenTimes(logits_SV, moved_bytes=lambda: next(moved))
    times.start()
    times.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for token in range(5):
        times.put(torch.tensor([token]))
    times.end()
    assert [interval.timed for interval in times.intervals] == [False, True, True, True, True]
    assert [interval.moved_bytes for interval in times.intervals] == [7, 0, 0, 0, 63]
    result = {
        "intervals": [
            make_interval(9.0, 10**9, 0, timed=False),
            *[make_interval(0.0, 0, 1)] * 3,
            make_interval(2.0, 10**9, 1),
        ],
        "counted_by": "runtime",
        "link_bytes_per_s": [1e9, 1e9],
        "load_seconds": 4.0,
        "drafting": {
            "windows": 1,
            "mean_window": 3.0,
            "acceptance": 1.0,
            "hidden_share": 0.5,
            "draft_tokens_per_s": 3.5,
        },
    }
    figures = summarize_run([result], compute_seconds=1.0)
    assert figures["limit_tokens_per_s"] == 3.5
    assert figures["tokens_per_s"] == {"median": 2.0, "p95": None, "n": 4}
    assert figures["windows"] == 1 and figures["hidden_share"] == 0.5
    runs = [
        make_run("resident", None, 4.0),
        make_run("ours-lossless", 800, 2.0),
        make_run("ours-exact", 800, 8.0),
        make_run("accelerate", 800, 0.5, peer=True),
        make_run("llama.cpp", 800, 10.0, peer=True),
    ]
    ratios = add_ratios(runs)
    assert ratios["exact_vs_best_peer"] == {"800": 16.0}
    assert ratios["exact_vs_llama_cpp"] == {"800": 0.8}
    assert ratios["exact_vs_lossless"] == {"800": 4.0}
    assert ratios["exact_vs_resident"] == {"800": 2.0}


def test_one_other_bit_is_found() -> None:
    logits_SV = np.random.default_rng(0).standard_normal((4, 8), dtype=np.float32)
    resident = {"tokens": [1, 2, 3, 4], "logits_SV": logits_SV}
    same = compare_to_resident({"tokens": [1, 2], "logits_SV": logits_SV[:2]}, resident)
    assert same["bit_equal"] and same["passes"] == same["tokens_equal"] == 2
    assert same["first_kl_nats"] == 0
    other_SV = logits_SV.copy()
    other_SV[3, 5] = np.nextafter(other_SV[3, 5], np.float32(9))
    assert not compare_to_resident({**resident, "logits_SV": other_SV}, resident)["bit_equal"]
    tokens = compare_to_resident({**resident, "tokens": [1, 9, 3, 4]}, resident)
    assert not tokens["bit_equal"]
    assert (tokens["tokens_equal"], tokens["tokens_equal_at_start"]) == (3, 1)


def test_the_picture_is_drawn_and_refused_without_runs(tmp_path: Path) -> None:
    plot_offload({"runs": make_runs()}, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(InputError, match="nothing to draw"):
        plot_offload({"runs": [make_run("ours-int8", 900, None)]}, tmp_path / "b.png")


def test_files_leave_the_page_cache(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(2**20))
    (tmp_path / "empty").touch()
    total, left = drop_page_cache(tmp_path)
    assert total == 2**20
    assert left in (0, 2**20)  # a file system in memory keeps it


def test_a_worker_without_enough_memory_did_not_survive(tmp_path: Path) -> None:
    runner = Runner(
        folder=tmp_path,
        checkpoint=tmp_path,
        shape=SHAPE,
        threads=1,
        reserve_bytes=0,
        budget_bytes=None,
        num_tokens=None,
        machine=None,
    )
    attempt = runner.measure(CPU_SETTING.resident, 40)
    assert attempt.result is None
    assert attempt.reason and attempt.limited.returncode


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limits", "-5"], "--limits -5 is out of range: allowed is any size above 0"),
        (["--only", "magic"], "--only 'magic' is unknown"),
        (["--tokens", "0"], "--tokens 0 is out of range: allowed are 2 to 200; leave"),
        (["--tokens", "1"], "--tokens 1"),
        (["--threads", "0"], "--threads 0 is out of range: allowed are 1 or more; leave"),
        (["--rounds", "0"], "--rounds 0 is out of range: allowed are 1 or more; 1 runs"),
        (["--reserve-mib", "-1"], "--reserve-mib -1 is out of range: allowed are 0 or more"),
        (["--ours-budget-mib", "-3"], "--ours-budget-mib -3.0 is out of range: .* leave"),
        (["--ours-budget-mib", "nan"], "--ours-budget-mib nan"),
        (["--gpu-budget-gib", "0"], "--gpu-budget-gib 0.0 is out of range"),
        (["--gpu-budget-gib", "6"], "--gpu-budget-gib has no effect without a GPU"),
        (["--quality", "nowhere"], "has no checkpoint"),
    ],
)
def test_wrong_input_is_refused(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        bench_offload.main([*arguments, "--device", "cpu", "--work-dir", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


def test_a_quick_run_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--quick", "--only", "ours-lossless"]
    arguments += ["--threads", "1", "--tokens", "2"]
    code = bench_offload.main([*arguments, "--work-dir", str(tmp_path)])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert code == 0, document["problems"]
    assert document["machine"]["device"] == "cpu" and document["machine"]["gpu"] is None
    resident, ours = document["runs"]
    assert resident["name"] == "resident" and ours["name"] == "ours-lossless"
    assert ours["survived"] and ours["match"]["bit_equal"]
    assert ours["bytes_per_token"] > 0 and ours["tokens_per_s"]["n"] == 2
    assert ours["budget_bytes"] < document["model"]["weight_bytes"]
    assert ours["peak_mib"] <= ours["limit_mib"]
    assert set(document["ratios"]) == {
        "lossless_1500",
        "lossless_1100",
        "int8_900",
        "int4_600",
        "int8_vs_resident",
        "int4_vs_resident",
    }
