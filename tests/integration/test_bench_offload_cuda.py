"""The offload benchmark's other half: a Llama on a GPU, and which half runs where."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lib.errors import InputError
from lib.report.offload_plots import plot_offload
from scripts.experiments.offload import arguments, bench_offload
from scripts.experiments.offload.cases import find_problems
from scripts.experiments.offload.cgroups import LimitedRun, LimitKind
from scripts.experiments.offload.checkpoint import make_checkpoint
from scripts.experiments.offload.figures import add_ratios, table
from scripts.experiments.offload.peers import System, Task
from scripts.experiments.offload.runner import Attempt, Runner
from scripts.experiments.offload.settings import CPU_SETTING, CUDA_SETTING, choose_setting
from scripts.experiments.offload.shapes import LLAMA_7B, TOY_LLAMA, LlamaShape
from scripts.experiments.offload.worker import generate

LLAMA = LlamaShape(layers=3, width=32, inner=64, heads=2, vocab_size=64, context=64)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def make_run(name: str, limit: int | None, rate: float | None, *, peer: bool = False) -> Any:
    return {
        "name": name,
        "label": name,
        "peer": peer,
        "limit_mib": limit,
        "survived": rate is not None,
        "reason": None if rate else "not installed",
        "tokens_per_s": {"median": rate, "p95": rate, "n": 6 if rate else 0},
        "ttft_s": rate,
        "peak_mib": 6000.0,
        "peak_anon_mib": None,
        "pinned_mib": 9000.0,
        "bytes_per_token": 2**20 if rate else None,
        "link_utilisation": 0.97 if rate else None,
        "attainable_utilisation": 0.99 if rate else None,
        "limit_tokens_per_s": rate,
        "match": None,
    }


def test_the_llama_checkpoint_is_in_bf16(tmp_path: Path) -> None:
    folder = make_checkpoint(LLAMA, tmp_path)
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert sum(2 * weight.numel() for weight in model.parameters()) == LLAMA.num_bytes()
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    random = np.random.default_rng([LLAMA.seed, 0])
    expected = random.standard_normal(64 * 32, dtype=np.float32) * np.float32(0.02)
    rounded = torch.from_numpy(expected).bfloat16().view(64, 32)
    assert torch.equal(model.model.embed_tokens.weight, rounded)
    assert abs(model.model.norm.weight.float().mean() - 1) < 0.05
    assert LLAMA_7B.num_bytes() == 2 * 6_738_415_616  # Llama 2 7B's


def test_ratios_on_a_gpu_are_of_its_budget(tmp_path: Path) -> None:
    rates = [("resident", None, 40.0), ("ours-lossless", 6144, 6.0), ("ours-int4", 6144, 24.0)]
    peers = [("accelerate", 0.5), ("diffusers-block", 2.0), ("diffusers-leaf", 3.0)]
    runs = [make_run(name, limit, rate) for name, limit, rate in rates]
    runs += [make_run(name, 6144, rate, peer=True) for name, rate in peers]
    runs += [make_run("flextensor", 6144, None, peer=True)]
    ratios = add_ratios(runs, gpu_limit_mib=6144)
    assert ratios["cuda_lossless_vs_diffusers"] == 2.0
    assert ratios["cuda_lossless_vs_accelerate"] == 12.0
    assert ratios["cuda_int4_vs_lossless"] == 4.0
    assert ratios["int4_vs_resident"] == 0.6 and ratios["lossless_1500"] is None
    assert "pinned MiB" in table(runs)
    plot_offload({"runs": runs}, tmp_path / "a.png")
    assert (tmp_path / "a.png").exists()


def test_the_device_decides_what_is_compared() -> None:
    assert choose_setting("auto", lambda: False) is choose_setting("cpu", lambda: True)
    assert choose_setting("cpu", lambda: True) is CPU_SETTING
    assert choose_setting("auto", lambda: True) is choose_setting("cuda", lambda: True)
    assert choose_setting("cuda", lambda: True) is CUDA_SETTING
    with pytest.raises(InputError, match="no CUDA device here; allowed: cpu, or auto"):
        choose_setting("cuda", lambda: False)


def test_who_is_run_under_which_limit() -> None:
    def plan(setting: Any, **choices: Any) -> list[str]:
        defaults = {"limits": setting.limits_mib, "only": None, "quick": False, "trained": False}
        cases = bench_offload.plan_cases(setting, Namespace(**defaults | choices))
        return [case.name for case in cases]

    names = plan(CPU_SETTING)
    assert names[0] == "resident, no limit"
    compressed = [name for name in names if "int" in name]
    assert compressed == [
        "ours-int8, 900 MiB",
        "ours-int4, 900 MiB",
        "ours-int8, 700 MiB",
        "ours-int4, 600 MiB",
    ]
    assert sum("ours-lossless" in name for name in names) == 5
    without_drafts = [system for system in CPU_SETTING.systems if not system.drafts]
    assert len(plan(CPU_SETTING, limits=[700], quick=True)) == len(without_drafts)
    assert "ours-exact, 700 MiB" in plan(CPU_SETTING, limits=[700], trained=True)
    assert plan(CUDA_SETTING) == [
        "resident, no limit",
        *[f"{system.name}, 6144 MiB" for system in CUDA_SETTING.systems[1:]],
    ]
    only = plan(CUDA_SETTING, limits=[4096, 6144], only=["flextensor"])
    assert only[1:] == ["flextensor, 4096 MiB", "flextensor, 6144 MiB"]


def test_a_resident_model_larger_than_the_gpu_is_no_failure() -> None:
    args: Any = Namespace(limits=[6144], only=["ours-lossless"], quick=False, trained=False)
    cases = list(bench_offload.plan_cases(CUDA_SETTING, args))
    runs = [make_run("resident", None, None), make_run("ours-lossless", 6144, 6.0)]
    assert len(find_problems(cases, runs)) == 2
    cases[0].impossible = True
    assert find_problems(cases, runs) == []


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_calls_for_a_gpu_give_the_resident_model_on_a_cpu(tmp_path: Path) -> None:
    """What a machine without a GPU can say of them: the APIs are right, streams aside."""
    checkpoint = make_checkpoint(LLAMA, tmp_path)
    tokens = {}
    for system in CUDA_SETTING.systems:
        if not system.is_installed() or system.name == "flextensor" or not system.full_precision:
            continue
        task = Task(
            checkpoint=checkpoint,
            folder=tmp_path / system.name,
            limit_bytes=None,
            reserve_bytes=0,
            budget_bytes=LLAMA.num_bytes() * 2 // 3,
            machine=None,
        )
        loaded = system.load(task)
        tokens[system.name] = generate(loaded, [1, 2, 3], 6, None, "cpu")
        if system.peer:
            assert loaded.bytes_per_pass and loaded.bytes_per_pass <= LLAMA.num_bytes()
    assert tokens.keys() >= {"resident", "ours-lossless", "accelerate"}
    assert all(found == tokens["resident"] for found in tokens.values()), tokens


def test_the_document_of_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything around the workers, with what they would say."""
    limited = LimitedRun(
        returncode=0,
        kind=LimitKind.RLIMIT,
        limit_bytes=None,
        peak_bytes=9 * 2**30,
        peak_anon_bytes=8 * 2**30,
        out_of_memory=False,
        timed_out=False,
        seconds=1.0,
    )
    gpu = {"name": "a GPU", "memory_bytes": 2**33, "free_bytes": 0}
    seconds = {"ours-lossless": 0.5, "accelerate": 2.0, "diffusers-block": 1.0}

    def prepare(runner: Runner, system: System) -> Attempt:
        result = {"anonymous_bytes": 1, "gpu": gpu}
        return Attempt(result=result, limited=limited, reason=None)

    def measure(runner: Runner, system: System, limit_mib: int | None) -> Attempt:
        if system.name not in seconds:
            return Attempt(result=None, limited=limited, reason="out of GPU memory")
        interval = {"seconds": seconds[system.name], "disk_bytes": 0, "moved_bytes": 2**20}
        intervals = [{**interval, "segment": segment, "timed": segment > 0} for segment in (0, 1)]
        result = {
            "tokens": [1, 2],
            "load_seconds": 1.0,
            "intervals": intervals,
            "counted_by": "runtime" if system.name.startswith("ours") else "weights per pass",
            "bytes_per_pass": 2**21,
            "link_bytes_per_s": [2**22, 2**22],
            "anonymous_bytes": {},
            "device_memory": {
                "peak_reserved_bytes": 2**29,
                "device_used_bytes": 2**30,
                "pinned_bytes": 2**20,
            },
            "plan": {"bytes_per_tier": {"CPU": 2**21}},
            "budget_bytes": 5,
        }
        return Attempt(result=result, limited=limited, reason=None)

    monkeypatch.setattr(arguments, "choose_setting", lambda device: CUDA_SETTING)
    monkeypatch.setattr(System, "is_installed", lambda system: True)
    monkeypatch.setattr(Runner, "prepare", prepare)
    monkeypatch.setattr(Runner, "measure", measure)
    code = bench_offload.main(["--quick", "--gpu-budget-gib", "2", "--work-dir", str(tmp_path)])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert code == 1 and len(document["problems"]) == 2  # int8 and int4; resident is impossible
    assert document["machine"]["gpu"] == gpu and document["model"]["family"] == "llama"
    runs = {run["name"]: run for run in document["runs"]}
    assert "it needs about" in runs["resident"]["reason"]
    ours = runs["ours-lossless"]
    assert (ours["limit_mib"], ours["peak_mib"], ours["pinned_mib"]) == (2048, 512.0, 3.0)
    assert ours["host_peak_mib"] == 9 * 1024 and ours["match"] is None
    assert ours["link_utilisation"] == 0.5 and ours["limit_tokens_per_s"] == 4.0
    assert document["ratios"]["cuda_lossless_vs_accelerate"] == 4.0
    assert document["ratios"]["cuda_lossless_vs_diffusers"] == 2.0
    assert document["ratios"]["cuda_int4_vs_lossless"] is None


@pytest.mark.gpu
@needs_gpu
def test_the_link_to_a_gpu_is_measured() -> None:
    from scripts.experiments.offload.meters import CopyMeter

    torch.cuda.empty_cache()
    meter = CopyMeter(limit_bytes=2**30)
    try:
        meter.use_units(2**24)
        assert 1e9 < meter.measure_link() < 1e12
        assert meter.memory()["peak_reserved_bytes"] == 0  # its own buffer is not counted
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2**31, dtype=torch.uint8, device="cuda")
    finally:
        meter.close()
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
@needs_gpu
def test_a_quick_run_on_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--device", "cuda", "--quick", "--plot", str(tmp_path / "a.png")]
    code = bench_offload.main([*flags, "--work-dir", str(tmp_path / "work")])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert code == 0, document["problems"]
    assert document["machine"]["device"] == "cuda" and document["machine"]["gpu"]["name"]
    runs = {run["name"]: run for run in document["runs"]}
    for name in ("ours-lossless", "ours-int8", "ours-int4", "accelerate"):
        run = runs[name]
        assert run["survived"], run["reason"]
        assert 0 < run["peak_mib"] <= run["limit_mib"]
        assert run["tokens_per_s"]["n"] == 4
    assert runs["ours-lossless"]["match"]["bit_equal"]
    assert runs["ours-lossless"]["budget_bytes"] == TOY_LLAMA.num_bytes() // 2
    assert 0 < runs["ours-lossless"]["bytes_per_token"] < TOY_LLAMA.num_bytes()
    assert runs["accelerate"]["bytes_per_token"] == TOY_LLAMA.num_bytes()
    assert document["ratios"]["cuda_int4_vs_lossless"] > 0
