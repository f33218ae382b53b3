"""measure_acceptance.py and leave_grid.py on a tiny GPT-2 with measured curves, end to end."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from test_verify_epsilon import save_model

from lib.commands.cli import run_main
from lib.hints import load_hints, save_hints
from lib.vocabulary import Precision
from scripts.experiments.exact import leave_grid, measure_acceptance


@pytest.fixture(autouse=True)
def short_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_acceptance, "KINDS", ("code", "prose"))  # its context is 32 bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model(tmp_path_factory.mktemp("model") / "model")
    path = folder / "tier_hints.json"
    hints = load_hints(path)
    blocks = {
        name: replace(hint, kl={**hint.kl, Precision.INT5: hint.kl[Precision.INT4] / 4})
        if hint.kl
        else hint
        for name, hint in hints.blocks.items()
    }
    save_hints(hints, folder / "without_int5.json")
    save_hints(replace(hints, blocks=blocks), path)
    return folder


def test_a_document_and_a_picture_of_models_side_by_side(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = ["--model", str(folder), "--output", str(tmp_path / "tuned"), "--steps", "2"]
    tuned += ["--tokens", "16", "--learning-rate", "1e-2"]
    assert run_main(lambda: leave_grid.main(tuned)) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["moved"]["mean_step"] > 0 and found["moved"]["share"] > 0.5
    assert run_main(lambda: leave_grid.main(tuned)) == 2
    common = ["--tier-hints", str(folder / "tier_hints.json"), "--json", str(tmp_path / "a.json")]
    common += ["--samples", "3", "--prompt-tokens", "8", "--new-tokens", "12"]
    for name, model, more in (
        ("one", folder, []),
        ("two", tmp_path / "tuned", ["--other-weights", "--plot", str(tmp_path / "a.png")]),
    ):
        flags = ["--name", name, "--model", str(model), *common, *more]
        assert run_main(lambda flags=flags: measure_acceptance.main(flags)) == 0  # type: ignore[misc]
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document == json.loads((tmp_path / "a.json").read_text())
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    for model_found in document["models"].values():
        copies = model_found["copies"]
        assert list(copies)[:2] == ["int8", "int6"] and len(copies) == 10
        for width in ("int6", "int5", "int4", "int3"):
            mixed = copies[f"mixed, bytes of {width}"]
            assert mixed["bits"] <= copies[width]["bits"] + 1e-9
            assert mixed["predicted"] >= copies[width]["predicted"]
        for kind in ("code", "prose"):
            shares = [copies[width]["kinds"][kind]["sampled"] for width in ("int8", "int4", "int2")]
            assert shares == sorted(shares, reverse=True) and shares[0] > 0.9


def test_hints_without_all_widths_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--name", "one", "--model", str(folder), "--prompt-tokens", "8", "--new-tokens", "4"]
    flags += ["--samples", "2", "--tier-hints", str(folder / "without_int5.json")]
    assert run_main(lambda: measure_acceptance.main(flags)) == 2
    assert "calibrate them first" in capsys.readouterr().err
