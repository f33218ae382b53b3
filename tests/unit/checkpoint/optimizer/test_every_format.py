"""One suite for every format of optimizer states: what is read is what the optimizer had."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from saved_states import BETA2, MODELS, WRITERS, train

from lib.blocks import unique_parameters
from lib.checkpoint.optimizer import SavedMoment, open_optimizer
from lib.errors import InputError
from lib.signals.optimizers import corrected_moments


@pytest.fixture(params=WRITERS)
def saved(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def save(kind: str, folder: Path, model: str = "gpt2") -> tuple[Path, dict[str, torch.Tensor]]:
    """Save a trained optimizer, and return the moments that the live collector reads from it."""
    network, optimizer = train(model)
    return WRITERS[kind](folder, network, optimizer), dict(corrected_moments(optimizer, network))


@pytest.mark.parametrize("model", MODELS)
def test_the_moments_are_the_live_collectors(saved: str, model: str, tmp_path: Path) -> None:
    path, expected = save(saved, tmp_path, model)
    with torch.device("meta"):
        empty = MODELS[model]()
    found = open_optimizer(path).moments(empty)
    assert found.keys() == expected.keys() == unique_parameters(empty).keys()
    for name, moment in found.items():
        assert moment.beta2 == BETA2 and moment.steps == (3,)
        assert moment.shape == expected[name].shape
        assert torch.equal(moment.corrected(), expected[name]), name


def test_what_the_state_says_of_the_optimizer(saved: str, tmp_path: Path) -> None:
    path, _ = save(saved, tmp_path)
    kind = open_optimizer(path).kind
    assert (kind.name, kind.amsgrad, kind.coupled_weight_decay) == ("AdamW", False, False)


def test_another_model_is_refused(saved: str, tmp_path: Path) -> None:
    path, _ = save(saved, tmp_path)
    with pytest.raises(InputError, match="give the model that was trained"):
        open_optimizer(path).moments(MODELS["llama"]())


def test_a_truncated_file_is_refused(saved: str, tmp_path: Path) -> None:
    path, _ = save(saved, tmp_path)
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    files = [each for each in files if each.suffix in (".pt", ".bin", ".distcp", ".safetensors")]
    largest = max(files, key=lambda each: each.stat().st_size)
    for share in (0.0, 0.3, 0.99):
        copy = tmp_path / "copy"
        shutil.copytree(path, copy) if path.is_dir() else shutil.copy(path, tmp_path / "copy.pt")
        target = copy / largest.relative_to(path) if path.is_dir() else tmp_path / "copy.pt"
        data = largest.read_bytes()
        target.write_bytes(data[: math.floor(len(data) * share)])
        with pytest.raises(InputError, match="truncated|damaged|copy"):
            read_all(copy if path.is_dir() else target)
        shutil.rmtree(copy, ignore_errors=True)


def read_all(path: Path) -> dict[str, SavedMoment]:
    found = open_optimizer(path).moments(MODELS["gpt2"]())
    for moment in found.values():
        moment.read()
    return found
