"""The safety table: no wrong answer of ours in any row, and wrong answers are found."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from scripts.experiments.safety import safety_table
from scripts.experiments.safety.cases import CASES, SafetyCase
from scripts.experiments.safety.offloaders import OFFLOADERS, Offloader

OURS = OFFLOADERS[0]


def offload_wrongly(model: nn.Module, folder: Path) -> Callable[[], None]:
    """Lose one weight."""
    with torch.no_grad():
        next(model.parameters()).zero_()
    return lambda: None


WRONG = Offloader(
    name="wrong", offload=offload_wrongly, weight_files="*", module="torch", exact=True
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ours_is_right_or_refuses(case: SafetyCase, tmp_path: Path) -> None:
    verdict = safety_table.judge(case, OURS, tmp_path)
    assert verdict in safety_table.GOOD
    if case.damage is None:
        assert verdict == "correct"


def test_a_wrong_answer_is_found(tmp_path: Path) -> None:
    assert safety_table.judge(CASES[0], WRONG, tmp_path).startswith("wrong (off by ")


def test_what_is_not_installed_is_said() -> None:
    missing = Offloader(name="x", offload=offload_wrongly, weight_files="*", module="no_such.part")
    assert safety_table.run_cell(CASES[0], missing) == "not installed"


def test_the_document_has_a_row_for_every_case(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safety_table, "CASES", CASES[:2])
    assert safety_table.main([]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["case"] for row in document["rows"]] == ["reused folder", "flipped byte"]
    assert all({"case", "ours", "accelerate", "diffusers"} == set(row) for row in document["rows"])
    assert all(row["ours"] in safety_table.GOOD for row in document["rows"])


def test_a_wrong_answer_of_ours_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = Offloader(name="ours", offload=offload_wrongly, weight_files="*", module="torch")
    monkeypatch.setattr(safety_table, "CASES", CASES[:1])
    monkeypatch.setattr(safety_table, "OFFLOADERS", (bad,))
    assert safety_table.main([]) == 1
    assert "neither correct nor refused: reused folder" in capsys.readouterr().err
