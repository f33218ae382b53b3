"""From the disk to the first token, timed beside reading the file."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_llama

from lib.commands.cli import run_main
from scripts.experiments.offload import bench_load


@pytest.mark.parametrize("in_memory", [False, True])
def test_each_precision_gets_its_stages_and_a_ratio(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    in_memory: bool,
) -> None:
    def run_here(args: Any, precision: Any, *, records: str) -> Any:
        args.worker = str(precision)
        monkeypatch.setenv("TIERHINTS_RECORDS", records)
        return bench_load.run_once(args)

    tiny_llama().save_pretrained(tmp_path)
    monkeypatch.setattr(bench_load, "start_worker", run_here)
    flags = ["--model", str(tmp_path), "--precisions", "int8,fp32", "--rounds", "2"]
    assert bench_load.main(flags + ["--in-memory"] * in_memory) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["file_bytes"] == (tmp_path / "model.safetensors").stat().st_size
    turns = (False,) if in_memory else (False, True)
    cases = [(precision, again) for precision in ("int8", "fp32") for again in turns]
    for result, case in zip(document["results"], cases, strict=True):
        seconds = result["seconds"]
        assert (result["precision"], result["again"]) == case and len(result["ratios"]) == 2
        assert min(seconds["load"], seconds["attach"], seconds["first_token"], seconds["read"]) > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "a folder with safetensors files"),
        (["--rounds", "0"], "--rounds 0: at least 1"),
        (["--precisions", "int9"], "precision 'int9': allowed are"),
    ],
)
def test_wrong_flags_exit_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    if flags:
        tiny_llama().save_pretrained(tmp_path)
    assert run_main(lambda: bench_load.main(["--model", str(tmp_path), *flags])) == 2
    assert message in capsys.readouterr().err
