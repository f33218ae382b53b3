"""The study end to end on toy models, and that what is there isn't repeated."""

import json
from pathlib import Path

import pytest

from scripts.experiments.study import grid, study_signals

TINY: dict[str, grid.Value] = {**grid.TOY, "GPT2_LAYERS": 2, "TRAIN_EVAL_SEQUENCES": 8}


@pytest.fixture
def two_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    texts = tmp_path / "texts"
    texts.mkdir()
    for index in range(40):
        (texts / f"{index}.txt").write_text(f"line {index} of a text\n" * 60)
    symbols: dict[str, grid.Value] = {**TINY, "DATA_FILES": True, "DATA_FILES_GLOB": str(texts)}
    symbols |= {"DATA_HELDOUT_PERMILLE": 200, "GPT2_VOCAB_SIZE": 270}
    runs = [
        grid.StudyRun(corpus="text", seed=0, symbols=symbols, every_checkpoint=True),
        grid.StudyRun(
            corpus="text", seed=0, variant="clip off", symbols={**symbols, "TRAIN_CLIP": "0"}
        ),
    ]
    monkeypatch.setattr(study_signals, "list_runs", lambda quick: runs)
    return tmp_path


def test_the_study_trains_measures_and_concludes(
    two_runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    work, plot = two_runs / "study", two_runs / "study.png"
    arguments = ["--quick", "--work-dir", str(work), "--plot", str(plot)]
    assert study_signals.main(arguments) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert plot.stat().st_size > 10_000
    base, variant = document["runs"]
    assert [c["step"] for c in base["checkpoints"]] == [4, 8]
    assert [c["step"] for c in variant["checkpoints"]] == [8]
    final = base["checkpoints"][-1]
    assert final["blocks"]["fisher_true"]["overall"] > 0.5
    assert final["allocation"]["4.0"]["fisher_true"]["over_true"] == 1
    assert final["floors"]["0.01"]["fisher_true"]["steps"] == 0
    assert set(document["summary"]["variants"]) == {"clip off"}

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(study_signals, "measure_checkpoint", never)
    assert study_signals.main(arguments) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["runs"] == document["runs"]
    (work / "text-base-base-0" / "steps" / "8" / "study.json").unlink()
    with pytest.raises(AssertionError, match="measured again"):
        study_signals.main(arguments)
