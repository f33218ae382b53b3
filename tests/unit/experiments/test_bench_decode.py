"""The decode benchmark: every system through its worker, the GGUF file, the figures."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lib.commands.cli import run_main
from lib.tiering.hooks import surroundings
from scripts.experiments.decode import (
    bench_attached,
    bench_decode,
    bench_kernels,
    bench_streamed,
    models,
)
from scripts.experiments.decode.figures import RATIOS, Cell, Judged, find_ratios, make_row
from scripts.experiments.decode.gguf_file import write_gguf
from scripts.experiments.decode.peers import SYSTEMS, Sizes, Task
from scripts.experiments.decode.peers.llama_cpp import SOURCE, read_shapes
from scripts.experiments.decode.rounds import measure_model
from scripts.experiments.decode.worker import serve
from scripts.experiments.decode.workers import WorkerError, WorkerProcess, is_installed
from scripts.experiments.offload.checkpoint import make_checkpoint
from scripts.experiments.offload.shapes import GPT2Shape

SHAPE = GPT2Shape(layers=2, width=64, heads=2, vocab_size=100, context=512)
MATRICES = 100 * 64 + 512 * 64 + 2 * 12 * 64 * 64
PROMPT = list(range(1, 9))
HELD = {
    ("transformers", "fp32"): 4.0,
    ("transformers", "bf16"): 2.0,
    ("ours", "lossless"): 4.0,
    ("ours", "int4"): 1.7,
    ("torchao", "int8"): 2.2,
    ("torchao", "int4"): 2.2,
    ("llama.cpp", "Q8_0"): 2.0,
}
"""Bytes of a held weight, at most: positions and torchao's embedding stay as they are."""


def ask(*requests: dict[str, Any]) -> list[dict[str, Any]]:
    answers = io.StringIO()
    serve(io.StringIO("".join(json.dumps(request) + "\n" for request in requests)), answers)
    return [json.loads(line) for line in answers.getvalue().splitlines()]


def make_task(folder: Path, width: str) -> dict[str, Any]:
    checkpoint = make_checkpoint(SHAPE, folder)
    return Task(checkpoint=checkpoint, folder=folder, width=width, threads=1).to_json()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("name", "width"), HELD)
def test_every_system_decodes_and_gives_logits(name: str, width: str, tmp_path: Path) -> None:
    system = SYSTEMS[name]
    try:
        __import__({"torchao": "torchao", "llama.cpp": "llama_cpp"}.get(name, "torch"))
    except ImportError:
        pytest.skip(f"not installed: {system.install}")
    task, path = make_task(tmp_path, width), tmp_path / "logits"
    if name == "llama.cpp":
        write_gguf(make_checkpoint(SHAPE, tmp_path), tmp_path / SOURCE)
    mode = system.modes[0]
    loaded, *rest = ask(
        {"call": "load", "system": name, "task": task},
        {"call": "prepare", "mode": mode, "ids": [PROMPT, PROMPT[::-1]], "steps": 5},
        {"call": "decode", "mode": mode, "steps": 5},
        {"call": "decode", "mode": mode, "steps": 5},
        {"call": "prefill", "ids": PROMPT},
        {"call": "logits", "ids": PROMPT, "path": str(path)},
    )
    sizes = loaded["result"]
    assert 0 < sizes["read_bytes"] < sizes["held_bytes"] <= HELD[name, width] * MATRICES
    assert [len(answer["result"]) for answer in rest[1:3]] == [3, 3]
    assert rest[3]["result"] > 0
    logits_TV = np.fromfile(path, np.float32).reshape(len(PROMPT), SHAPE.vocab_size)
    plain = SYSTEMS["transformers"].load(Task.from_json({**task, "width": "fp32"}))
    expected_TV = plain.logits(np.array(PROMPT))
    if width in ("fp32", "lossless"):
        assert (logits_TV == expected_TV).all()
    assert np.corrcoef(logits_TV.ravel(), expected_TV.ravel())[0, 1] > 0.95


def test_a_compiled_step_gives_the_tokens_of_an_eager_one(tmp_path: Path) -> None:
    from scripts.experiments.decode.torch_session import Decoder

    plain: Any = SYSTEMS["transformers"].load(Task.from_json(make_task(tmp_path, "fp32")))
    model, ids = plain._model, torch.tensor([PROMPT])
    seen: dict[int | None, list[int]] = {}
    for room in (None, 6):
        found = seen.setdefault(room, [])

        def step(found: list[int] = found, **arguments: Any) -> Any:
            found.append(int(arguments["input_ids"]))
            return model(**arguments)

        with torch.no_grad():
            decoder = Decoder(model, ids, step=step, room=room)
            decoder.run(6)
            decoder.run(6)
    assert seen[None] == seen[6] and seen[6][:6] == seen[6][6:]


def test_the_gguf_file_has_the_checkpoints_weights(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    checkpoint, path = make_checkpoint(SHAPE, tmp_path), tmp_path / SOURCE
    write_gguf(checkpoint, path)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert len(tensors) == len(read_shapes(checkpoint)) == 2 * 12 + 4
    assert tensors["blk.1.ffn_up.weight"].data.shape == (4 * 64, 64)
    assert all(tensor.tensor_type == gguf.GGMLQuantizationType.F32 for tensor in tensors.values())


def test_a_request_that_fails_is_answered_and_a_worker_that_ended_says_so(tmp_path: Path) -> None:
    system, task = SYSTEMS["transformers"], make_task(tmp_path, "fp64")
    asked = ask({"call": "load", "system": "transformers", "task": task})
    assert asked == [{"error": "KeyError: 'fp64'"}]
    worker = WorkerProcess(
        system, Task.from_json(task), python="/bin/false", log=tmp_path / "worker.log"
    )
    with pytest.raises(WorkerError, match="ended during load: exit code 1"):
        worker.load()
    worker.close()
    assert not is_installed(SYSTEMS["llama.cpp"], "/bin/false")


@pytest.fixture
def flags(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    monkeypatch.setitem(models.RANDOM, "gpt2_medium", SHAPE)
    chosen = "--models gpt2_medium --systems ours --widths int4 --modes eager --batches 1 2"
    return [*chosen.split(), "--rounds", "2", "--steps", "3", "--work-dir", str(tmp_path)]


def test_the_last_line_has_a_row_of_each_and_the_ratios(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_decode.main(flags) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["bandwidth_gb_s"] > 0 and document["machine"]["threads"] >= 1
    model = document["models"]["gpt2_medium"]
    found = {
        (row["system"], row["width"], row["mode"], row["batch"]): row["n"] for row in model["rows"]
    }
    assert found == {
        (*system, *mode): 6 if mode[0] == "eager" else 3
        for system in (("transformers", "fp32"), ("ours", "int4"))
        for mode in (("prefill", 1), ("eager", 1), ("eager", 2))
    }
    for row in model["rows"]:
        assert row["ms_per_token"] > 0 and 0 < row["bytes_per_weight"] <= 4
        assert row["kl"] is row["perplexity"] is None  # of random weights
        assert (row["roofline_share"] is None) == (row["mode"] == "prefill")
    assert model["ratios"].keys() == model["ratios_eager"].keys() == RATIOS.keys()
    assert model["ratios_eager"]["int4_vs_fp32"] > 0 and model["ratios"]["int4_vs_fp32"] is None
    assert not model["failed"] and not model["absent"]


def test_what_the_time_does_not_hold_is_named(flags: list[str], tmp_path: Path) -> None:
    args = bench_decode.parse_arguments([*flags, "--systems", "transformers", "--widths", "fp32"])
    model = models.find_model(
        "gpt2_medium", checkpoint=None, hints=None, demo_folder=tmp_path, work_dir=tmp_path
    )
    measured = measure_model(model, bench_decode.chosen_systems(args), args, seconds=0)
    assert [cell.mode for cell in measured.cells] == ["prefill"]
    assert measured.absent == {
        f"transformers fp32, eager, batch {batch}": "not begun within --minutes" for batch in (1, 2)
    }


def make_rows(*cells: tuple[str, str, str, float, float]) -> list[dict[str, Any]]:
    return [
        make_row(
            Cell(system=system, width=width, mode=mode, batch=1, tokens=1, seconds=[seconds]),
            Sizes(held_bytes=round(1000 * size), read_bytes=round(1000 * size)),
            Judged(kl_nats=0.1, perplexity=9.0),
            num_weights=1000,
            bandwidth_gb_s=1e-3,
        )
        for system, width, mode, seconds, size in cells
    ]


def test_ratios_are_against_plain_fp32_and_the_nearest_of_llama_cpp() -> None:
    rows = make_rows(
        ("transformers", "fp32", "compiled", 0.8, 4.0),
        ("transformers", "fp32", "eager", 1.0, 4.0),
        ("ours", "int4", "compiled", 0.2, 0.5625),
        ("ours", "int4", "eager", 0.4, 0.5625),
        ("llama.cpp", "Q8_0", "native", 0.5, 1.06),
        ("llama.cpp", "Q4_0", "native", 0.3, 0.56),
    )
    ratios, nearest = find_ratios(rows, "compiled")
    assert ratios["int4_vs_llama_cpp"] == pytest.approx(1.5)
    assert ratios["int4_vs_fp32"] == pytest.approx(4)
    assert ratios["int8_vs_fp32"] is None and nearest == {"int4": "Q4_0", "int8": None}
    assert find_ratios(rows, "eager")[0]["int4_vs_fp32"] == pytest.approx(2.5)
    assert rows[0]["roofline_share"] == pytest.approx(4000 / 1e6 / 0.8)
    assert rows[0]["ms_per_token"] == pytest.approx(800) and rows[0]["kl"] == 0.1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--systems", "vllm"], "allowed: transformers, ours, torchao, llama.cpp"),
        (["--widths", "int7"], "--widths 'int7' is unknown"),
        (["--batches", "0"], "--batches 0 is too small"),
        (["--minutes", "0"], "--minutes 0 is too small"),
        (["--model", "nowhere"], "nowhere has no config.json"),
    ],
)
def test_what_cannot_be_run_is_refused(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(lambda: bench_decode.main(flags)) == 2
    assert message in capsys.readouterr().err


def test_kernels_alone_are_timed_at_every_width(tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    flags = ["--shapes", "64x96", "--megabytes", "1", "--rounds", "2", "--json", str(path)]
    assert bench_kernels.main(flags) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["width"] for row in rows] == ["int8", "int6", "int5", "int4", "int3", "int2"]
    assert all(row["gb_s"] > 0 and row["bandwidth_share"] > 0 for row in rows)


@pytest.mark.parametrize("flags", [["--shapes", "64"], ["--rounds", "0"]])
def test_kernels_that_cannot_be_timed(flags: list[str]) -> None:
    assert run_main(lambda: bench_kernels.main(flags)) == 2


def test_streamed_steps_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surroundings, "compile_piece", lambda module, inputs: module)
    checkpoint, path = make_checkpoint(SHAPE, tmp_path), tmp_path / "streamed.json"
    flags = ["--model", str(checkpoint), "--models", "smollm2", "--widths", "lossless"]
    flags += ["--shares", "0.6", "--rounds", "1", "--steps", "2", "--threads", "1"]
    assert bench_streamed.main([*flags, "--json", str(path)]) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert row["n"] == 2 and row["streamed_bytes"] > 0 and row["ratio"] > 0
    assert run_main(lambda: bench_streamed.main(["--shares", "1.5"])) == 2


def test_attached_steps_take_turns_with_the_untouched_model(tmp_path: Path) -> None:
    checkpoint, path = make_checkpoint(SHAPE, tmp_path), tmp_path / "attached.json"
    flags = ["--model", str(checkpoint), "--models", "smollm2", "--widths", "lossless", "int4"]
    flags += ["--rounds", "3", "--steps", "2", "--threads", "1", "--work-dir", str(tmp_path)]
    assert bench_attached.main([*flags, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["width"] for row in rows] == ["plain", "lossless", "int4"]
    assert {row["model"] for row in rows} == {checkpoint.name}
    assert [row["n"] for row in rows] == [6, 6, 6] and rows[0]["ratio"] == 1
    for row in rows:
        low, high = row["ratio_interval"]
        assert low <= row["ratio"] <= high
    assert run_main(lambda: bench_attached.main(["--rounds", "0"])) == 2
