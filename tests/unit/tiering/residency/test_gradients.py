"""Offloaded weights serve inference: gradients are refused wherever they come from, and the flags
by which torch chooses how to compute stay as they were given.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.errors import PlacementError
from lib.tiering import attach


class Layers(nn.Module):
    """Linear layers that move by rows, with a place for a user's hook in front of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before = nn.Identity()
        self.layers = nn.ModuleList([nn.Linear(64, 64, bias=False) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


X = torch.linspace(-1, 1, 3 * 64).reshape(3, 64)


def soft_prompt(model: Layers) -> Tensor:
    learned = X.clone().requires_grad_(True)
    model.before.register_forward_hook(lambda module, args, output: learned)
    return model(X)


def adapter(model: Layers) -> Tensor:
    trainable = nn.Linear(64, 64)
    model.before.register_forward_hook(lambda module, args, output: trainable(output))
    return model(X)


def one_by_one(model: Layers) -> Tensor:
    x = X.clone().requires_grad_(True)
    for layer in model.layers:
        x = torch.tanh(layer(x))
    return x


def by_keyword(model: Layers) -> Tensor:
    return model.layers[0](input=X.clone().requires_grad_(True))


def functional(model: Layers) -> Tensor:
    return F.linear(X.clone().requires_grad_(True), model.layers[1].weight)


def flag_set(model: Layers) -> Tensor:
    model(X)
    for parameter in model.parameters():
        parameter.requires_grad = True
    return model(X)


@pytest.mark.parametrize(
    "use", [soft_prompt, adapter, one_by_one, by_keyword, functional, flag_set]
)
def test_gradients_are_refused_wherever_they_enter(
    use: Callable[[Layers], Tensor], tmp_path: Path
) -> None:
    model = Layers()
    with (
        attach(model, budget={"HBM": "16KiB", "SSD": None}, spill_dir=tmp_path),
        pytest.raises(PlacementError, match=r"torch\.no_grad|detach"),
    ):
        use(model).sum().backward()


def test_a_flag_that_was_changed_is_noticed_in_the_first_forward_too(tmp_path: Path) -> None:
    model = Layers().requires_grad_(False)
    with attach(model, budget={"HBM": "16KiB", "SSD": None}, spill_dir=tmp_path):
        model.layers[1].weight.requires_grad = True
        with pytest.raises(PlacementError, match="requires_grad of 'layers.1.weight' was set"):
            model(X)
        model.requires_grad_(False)
        model(X)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_forward_with_gradients_enabled_that_needs_none_runs(tmp_path: Path) -> None:
    model = Layers()
    with torch.no_grad():
        expected = model(X)
    with attach(model, budget={"HBM": "16KiB", "SSD": None}, spill_dir=tmp_path):
        for _ in range(2):
            assert torch.equal(model(X), expected)
            assert not model(X).requires_grad
            with torch.no_grad():
                assert torch.equal(model(X), expected)
    assert all(parameter.requires_grad for parameter in model.parameters())
    model(X).sum().backward()


class Folded(nn.Module):
    """torch.matmul folds a batch by requires_grad of its operands, with other last bits, whether or
    not gradients are recorded.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(128, 64, bias=False)
        self.outer = nn.Parameter(torch.randn(36, 31))

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(self.outer, self.inner(x.transpose(1, 2)))


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("budget", ["60KiB", None])
def test_flags_by_which_torch_chooses_its_kernels_are_kept(
    trainable: bool, budget: str | None, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 24)).requires_grad_(trainable)
    seen: list[bool] = []
    for layer in model:
        layer.register_forward_pre_hook(
            lambda module, args: seen.append(module.weight.requires_grad)
        )
    with (
        attach(model, dict.fromkeys(("0", "1"), "HBM" if budget is None else "SSD")),
        torch.no_grad(),
    ):
        model(torch.ones(2, 24))
    assert seen == [trainable] * 2


def test_a_streamed_matmul_has_the_resident_one_s_bits(tmp_path: Path) -> None:
    model = Folded()
    x = torch.randn(7, 128, 31)
    with torch.no_grad():
        expected = model(x)
        for budget in ("60KiB", None):
            with attach(model, budget={"HBM": budget, "SSD": None}, spill_dir=tmp_path):
                assert torch.equal(model(x), expected)
