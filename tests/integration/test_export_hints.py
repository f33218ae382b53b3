"""tierhints export from the command line to the files it writes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_gpt2, tiny_mixtral
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lib.blocks import parameter_digest, partition_model
from lib.commands import export as export_hints
from lib.commands.cli import run_main
from lib.hints import BlockHint, Hints, ModelInfo, save_hints
from lib.signals import measure_fisher, save_fisher_diagonal
from lib.vocabulary import Tier

ROOT = Path(__file__).parents[2]
TIERS = (Tier.HBM, Tier.CPU, Tier.SSD)


def save_model(model: Any, folder: Path) -> Path:
    """Write a checkpoint, and hints with the tiers in turn beside it."""
    model.eval().save_pretrained(folder)
    blocks = {
        block.name: BlockHint(
            tier=TIERS[index % 3],
            importance=0.7**index,
            rank=index + 1,
            num_bytes=block.num_bytes,
            num_params=block.num_params,
            reason="a test",
        )
        for index, block in enumerate(partition_model(model))
    }
    info = ModelInfo(
        id=str(folder),
        revision="",
        class_name=type(model).__name__,
        parameter_digest=parameter_digest(model),
    )
    provenance = {"signal": "fisher_diag", "created": "today"}
    save_hints(Hints(model=info, provenance=provenance, blocks=blocks), folder / "hints.json")
    return folder


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=48,
        )
    )


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tiny_gpt2(), tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tiny_llama(), tmp_path_factory.mktemp("llama"))


def export(folder: Path, to: str, output: Path, *flags: str) -> int:
    command = ["--to", to, "--tier-hints", str(folder / "hints.json"), "--output", str(output)]
    return run_main(lambda: export_hints.main([*command, *flags]))


def last_line(capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    captured = capsys.readouterr()
    document: dict[str, Any] = json.loads(captured.out.splitlines()[-1])
    return document, captured.err


def test_the_command_writes_a_device_map_that_transformers_loads(
    gpt2: Path, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    command = [sys.executable, "-m", "lib.commands", "export", "--to", "accelerate"]
    command += ["--device", "cpu", "--tier-hints", str(gpt2 / "hints.json"), "--model", str(gpt2)]
    command += ["--output", str(tmp_path), "--json", str(tmp_path / "result.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert result["files"] == [str(tmp_path / "device_map.json")]
    said = [line.removeprefix("not expressed: ") for line in done.stderr.splitlines()]
    assert said == result["not_expressed"]
    device_map = json.loads((tmp_path / "device_map.json").read_text())["device_map"]
    loaded = AutoModelForCausalLM.from_pretrained(
        gpt2, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    model = GPT2LMHeadModel.from_pretrained(gpt2)
    tokens = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_each_format_writes_its_files(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    for to, files in {
        "torchao": ["torchao.json"],
        "llama-cpp": ["tensor_types.txt", "override_tensor.txt"],
        "vllm": ["vllm.yaml"],
    }.items():
        assert export(llama, to, tmp_path) == 0
        result, said = last_line(capsys)
        assert result["to"] == to
        assert result["files"] == [str(tmp_path / name) for name in files]
        assert all((tmp_path / name).stat().st_size for name in files)
        assert said.count("not expressed: ") == len(result["not_expressed"]) > 0


def test_a_fisher_diagonal_becomes_an_importance_matrix(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gguf = pytest.importorskip("gguf")
    model = LlamaForCausalLM.from_pretrained(llama)
    tokens = torch.randint(0, 48, (2, 16), generator=torch.Generator().manual_seed(0))
    diagonal = tmp_path / "diagonal.safetensors"
    result = measure_fisher(model, [tokens], keep_diagonal=True, seed=0)
    save_fisher_diagonal(result, diagonal, parameter_digest=parameter_digest(model))
    assert export(llama, "imatrix", tmp_path, "--fisher", str(diagonal)) == 0
    document, _ = last_line(capsys)
    tensors = gguf.GGUFReader(tmp_path / "imatrix.gguf").tensors
    assert len(tensors) == 2 * document["tensors"] == 2 * (2 * 7 + 2)


def test_checkpoints_under_other_names_are_loaded_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_model(tiny_mixtral(), tmp_path / "mixtral")
    assert any("experts.0.w1" in name for name in load_file(folder / "model.safetensors"))
    assert export(folder, "accelerate", tmp_path) == 0
    result, _ = last_line(capsys)
    assert any("packed parameter" in line for line in result["not_expressed"])


@pytest.mark.parametrize(
    ("to", "flags", "message"),
    [
        ("accelerate", ["--bits", "4"], "bits go with torchao or llama-cpp, not accelerate"),
        ("torchao", ["--bits", "nan"], "bits nan are out of range"),
        ("llama-cpp", ["--bits", "1"], "--bits 1.0 is too few"),
        ("imatrix", [], "--fisher FILE) goes with imatrix"),
        ("vllm", ["--fisher", "x"], "--fisher FILE) goes with imatrix"),
        ("vllm", ["--model", "nowhere/at/all"], "does not exist"),
    ],
)
def test_wrong_flags_are_refused(
    llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    to: str,
    flags: list[str],
    message: str,
) -> None:
    pytest.importorskip("gguf")
    assert export(llama, to, tmp_path / "out", *flags) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_format_is_refused(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(llama, "onnx", tmp_path) == 2
    assert "--to: invalid choice: 'onnx'" in capsys.readouterr().err


def test_hints_of_other_weights_are_refused(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    LlamaForCausalLM.from_pretrained(llama).save_pretrained(other)
    weights = load_file(other / "model.safetensors")
    weights["lm_head.weight"] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert export(llama, "vllm", tmp_path / "out", "--model", str(other)) == 2
    assert "the hints were made for other weights" in capsys.readouterr().err


def test_flat_hints_do_where_tiers_are_enough(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    model = LlamaForCausalLM.from_pretrained(llama)
    flat = {block.name: "CPU" for block in partition_model(model)}
    (tmp_path / "hints.json").write_text(json.dumps(flat))
    model_flag = ("--model", str(llama))
    with pytest.warns(UserWarning, match="flat hints"):
        assert export(tmp_path, "accelerate", tmp_path, *model_flag) == 0
        assert export(tmp_path, "llama-cpp", tmp_path, *model_flag) == 2
        assert "no importance and no KL curves" in capsys.readouterr().err
        assert export(tmp_path, "vllm", tmp_path) == 2
    assert "give its checkpoint with --model" in capsys.readouterr().err
