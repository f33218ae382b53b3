"""Models that were built without weights and get them from a checkpoint at attach."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from lib.errors import InputError
from lib.tiering import attach, empty_weights

X = torch.linspace(-2, 2, 32 * 64).reshape(32, 64)


def save(model: nn.Module, folder: Path, **changes: Any) -> Path:
    path = folder / "model.safetensors"
    state = {name: value for name, value in model.state_dict().items() if name not in changes}
    save_file(state, path)
    return path


def normalized() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 64))


def trained() -> nn.Sequential:
    torch.manual_seed(0)
    model = normalized()
    for _ in range(10):
        model(3 * X + 1)
    return model.eval()


@pytest.mark.parametrize("budget", ["20KiB", None])
def test_persistent_buffers_come_from_the_checkpoint_and_go_at_detach(
    budget: str | None, tmp_path: Path
) -> None:
    model = trained()
    path = save(model, tmp_path)
    with empty_weights():
        empty = normalized().eval()
    before = [value.clone() for value in empty.buffers()]
    with torch.no_grad():
        limits = {"HBM": budget, "SSD": None}
        with attach(empty, budget=limits, weights=path, spill_dir=tmp_path / "spill"):
            assert torch.equal(empty(X), model(X))
            assert int(empty[1].num_batches_tracked) == 10
    assert all(map(torch.equal, empty.buffers(), before))


def test_a_persistent_buffer_that_the_checkpoint_lacks_is_named(tmp_path: Path) -> None:
    path = save(trained(), tmp_path, **{"1.running_mean": None})
    with empty_weights():
        empty = normalized().eval()
    with pytest.raises(InputError, match=r"'1\.running_mean' belongs to the model's state"):
        attach(empty, budget={"HBM": None}, weights=path)
    assert all(parameter.is_meta for parameter in empty.parameters())


class Listing(nn.Module):
    """Keeps its children's parameters in a list, too, and computes with that."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
        self.weights = [self.a.weight, self.b.weight]

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = F.linear(x, weight)
        return x + self.a.bias


@pytest.mark.parametrize("tier", ["HBM", "SSD"])
def test_parameters_that_are_kept_elsewhere_have_the_checkpoint_s_weights(
    tier: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = Listing()
    path = save(model, tmp_path)
    with empty_weights():
        empty = Listing()
    kept = list(empty.weights)
    with torch.no_grad():
        expected = model(X)
        with attach(empty, dict.fromkeys("ab", tier), weights=path, spill_dir=tmp_path / "spill"):
            assert torch.equal(empty(X), expected)
    assert all(
        a is b and a.is_meta and a.shape == (64, 64)
        for a, b in zip(kept, empty.weights, strict=True)
    )


class Derived(nn.Module):
    """Makes a tensor from its weights once and for all."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(64, 64)
        self.doubled = {"a": [self.a.weight.detach() * 2]}

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.doubled["a"][0])


def test_tensors_made_from_weights_that_were_not_there_are_refused(tmp_path: Path) -> None:
    path = save(Derived(), tmp_path)
    with empty_weights():
        empty = Derived()
    with pytest.raises(InputError, match="keeps a tensor in 'doubled' that was made"):
        attach(empty, budget={"HBM": None}, weights=path)


class Tied(nn.Module):
    """Ties by a variable, and keeps the parameter that it made."""

    def __init__(self, *, listed: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
        made = nn.Parameter(torch.randn(64, 64))
        self.a.weight = made
        self.b.weight = made
        self.kept = [made] if listed else []

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.b(self.a(x)), self.kept[0] if self.kept else self.a.weight)


def test_weights_that_a_constructor_ties_by_a_variable_stay_tied(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tied(listed=False)
    path = save(model, tmp_path, **{"b.weight": None})
    with empty_weights():
        empty = Tied(listed=False)
    assert empty.a.weight is empty.b.weight
    with torch.no_grad():
        expected = model(X)
        with attach(empty, budget={"HBM": None}, weights=path):
            assert torch.equal(empty(X), expected)
    with empty_weights():
        empty = Tied(listed=True)
    with pytest.raises(InputError, match="keeps a tensor in 'kept'"):
        attach(empty, budget={"HBM": None}, weights=path)


@pytest.mark.parametrize("tier", ["HBM", "SSD"])
def test_an_lstm_which_keeps_weak_references_gets_its_weights(tier: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LSTM(64, 64, 2))
    path = save(model, tmp_path)
    with empty_weights():
        empty = nn.Sequential(nn.LSTM(64, 64, 2))
    with torch.no_grad():
        expected = model(X)[0]
        with attach(empty, {"0": tier}, weights=path, spill_dir=tmp_path / "spill"):
            assert torch.equal(empty(X)[0], expected)
    assert all(parameter.is_meta for parameter in empty.parameters())
