"""measure_residuals.py on a tiny checkpoint, and what its parts count."""

import json
from pathlib import Path

import pytest
import torch
from test_verify_epsilon import save_model

from lib.codecs.native import load_native
from lib.commands.cli import run_main
from lib.vocabulary import Precision
from scripts.experiments.exact import measure_residuals, time_residuals
from scripts.experiments.exact.measure_residuals import Matrix, block_bits, byte_planes

pytestmark = pytest.mark.skipif(load_native().library is None, reason="the extension isn't there")


@pytest.mark.parametrize("bf16", [False, True])
def test_a_document_of_bits_and_of_passes(
    bf16: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_model(tmp_path / "model")
    flags = ["--model", str(folder), "--disk", str(tmp_path), "--json", str(tmp_path / "a.json")]
    flags += ["--bf16"] if bf16 else []
    assert run_main(lambda: measure_residuals.main(flags)) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document == json.loads((tmp_path / "a.json").read_text())
    assert document["bits"] == (16 if bf16 else 32)
    narrow, wide = (document["residuals"][name] for name in ("int4", "int8"))
    assert wide["entropy_bits"] < wide["packed_bits"] < narrow["packed_bits"] < document["bits"]
    slow = document["pass_ms"]["network, 100 MB/s"]
    assert slow["int8"] < slow["originals"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_ranks_are_within_their_intervals(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(64, 200, generator=generator).to(dtype)
    for width in measure_residuals.WIDTHS:
        rank, count = Matrix(weights, width).ranks()
        assert bool(((rank >= 0) & (rank < count)).all())
        needed = (count.double().log2().ceil().sum() / 8).item()
        lower = 2 * weights.numel() if dtype == torch.float32 else 0
        assert needed + lower <= Matrix(weights, width).encode() <= needed + lower + 8
    assert weights.dtype == dtype and Precision.INT8 in measure_residuals.WIDTHS


def test_planes_and_blocks() -> None:
    weights = torch.tensor([[1.0, -1.5]], dtype=torch.bfloat16)
    exponents, others = byte_planes(weights)
    assert exponents.flatten().tolist() == [127, 127]
    assert others.flatten().tolist() == [0, 0x80 | 0x40]
    assert block_bits(torch.full((64,), 7)) == 64 * 3 + 4
    assert block_bits(torch.tensor([0] * 63 + [1000])) == 22 + 4


def test_without_a_cgroup_passes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(time_residuals, "_CGROUPS", tmp_path / "nowhere")
    flags = ["--model", str(tmp_path), "--budget", "1MiB", "--work-dir", str(tmp_path)]
    assert run_main(lambda: time_residuals.main(flags)) == 2
    assert "cgroup" in capsys.readouterr().err
