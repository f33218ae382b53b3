"""An interrupted calibration goes on, and ends with the hints of one that ran through."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lib.blocks import partition_model
from lib.evaluation import journal as journals
from lib.evaluation.calibration import calibrate, calibrate_on_parts
from lib.hints import Hints
from lib.signals.collect import collect_fisher
from lib.text.held_out import HeldOutText
from lib.text.parts import cut_parts
from tests.tiny_models import tiny_gpt2

TOKENS = torch.randint(0, 40, (18, 12), generator=torch.Generator().manual_seed(0))


def hints_of(model: Any) -> Hints:
    return collect_fisher(model, TOKENS, model_id="tiny")


def run(model: Any, hints: Hints, path: Path | None) -> Hints:
    return calibrate(model, hints, TOKENS, draws=8, seed=3, journal=path)


@pytest.mark.parametrize("after", [3, 60])
def test_interrupted_and_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    model = tiny_gpt2().eval()
    hints = hints_of(model)
    whole = run(model, hints, None)
    path = tmp_path / "hints.json.calibration"
    steps: list[str] = []
    inner = journals.Journal.__call__

    def counted(self: Any, name: str, compute: Any) -> Any:
        def count() -> Any:
            if len(steps) == after:
                raise KeyboardInterrupt
            steps.append(name)
            return compute()

        return inner(self, name, count)

    monkeypatch.setattr(journals.Journal, "__call__", counted)
    with pytest.raises(KeyboardInterrupt):
        run(model, hints, path)
    assert path.exists() and len(steps) == after
    before = list(steps)
    monkeypatch.setattr(journals.Journal, "__call__", inner)
    resumed = run(model, hints, path)
    assert not path.exists()
    assert resumed == whole and len(set(before)) == after
    assert resumed.blocks.keys() == {block.name for block in partition_model(model)}


def test_a_race_ends_with_the_factor_of_every_sequence() -> None:
    model = tiny_gpt2().eval()
    hints = hints_of(model)
    text = cut_parts(HeldOutText(tokens=TOKENS.repeat(4, 1), source=""), seed=None)
    qualities = [
        calibrate_on_parts(
            model, hints, text, folder="", draws=8, seed=1, every_sequence=every_sequence
        )[0].quality
        for every_sequence in (False, True)
    ]
    raced, whole = qualities
    assert raced["conformal_factor"] == pytest.approx(whole["conformal_factor"], rel=0.1)
    assert whole["race"] is None and raced["race"]["sequences"] == 24
    assert raced["race"]["mean_sequences_per_plan"] < 12
