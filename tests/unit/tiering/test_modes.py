"""Modes of PyTorch that a caller may be in: attach, forwards and detach do the same in each."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_model
from tiny_models import tiny_llama
from torch import Tensor, nn
from torch.autograd import forward_ad

from lib.errors import PlacementError
from lib.tiering import attach, empty_weights

IDS = torch.arange(6)[None]
EVERYTHING = {"HBM": None, "SSD": None}


@contextmanager
def setting(set_it: Callable[[Any], Any], value: Any, before: Any) -> Iterator[None]:
    set_it(value)
    try:
        yield
    finally:
        set_it(before)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "torch.device('meta')": lambda: torch.device("meta"),
    "default device meta": lambda: setting(torch.set_default_device, "meta", None),
    "default device cuda": lambda: setting(torch.set_default_device, "cuda", None),
    "default dtype float16": lambda: setting(torch.set_default_dtype, torch.float16, torch.float32),
    "default dtype float64": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "inference mode": torch.inference_mode,
    "deterministic algorithms": lambda: setting(torch.use_deterministic_algorithms, True, False),
    "gradients": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}
PLANS: dict[str, dict[str, Any]] = {
    "streamed": {"budget": {"HBM": "28KiB", "SSD": None}},
    "resident": {"budget": EVERYTHING},
    "int4": {"budget": EVERYTHING, "precision": "int4"},
    "int8, streamed": {"budget": {"HBM": "60KiB", "SSD": None}, "precision": "int8"},
    "emulated": {"budget": {"HBM": "28KiB", "SSD": None}, "mode": "emulated"},
    "a checkpoint's": {"budget": {"HBM": "28KiB", "SSD": None}, "weights": "model.safetensors"},
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_attach_does_not_depend_on_the_caller_s_modes(mode: str, plan: str, tmp_path: Path) -> None:
    options = dict(PLANS[plan])

    def build() -> nn.Module:
        if "weights" not in options:
            return tiny_llama().eval()
        with empty_weights():
            return tiny_llama().eval()

    if "weights" in options:
        save_model(tiny_llama(), str(tmp_path / "model.safetensors"))
        options["weights"] = tmp_path / "model.safetensors"
    model = build()
    with attach(model, **options):
        expected = model(IDS).logits
    model = build()
    with MODES[mode]():
        runtime = attach(model, **options)
    assert torch.equal(model(IDS).logits, expected)
    if mode != "autocast":
        with MODES[mode](), torch.no_grad():
            assert torch.equal(model(IDS, position_ids=IDS).logits, expected)
    with MODES[mode]():
        runtime.budget = EVERYTHING
        state = model.state_dict() if "int" not in plan else {}
    assert torch.equal(model(IDS).logits, expected)
    with MODES[mode]():
        runtime.detach()
    given = tiny_llama().state_dict()
    assert all(torch.equal(value, given[name]) for name, value in state.items())
    if "weights" not in options:
        after = model.state_dict()
        assert all(torch.equal(after[name], value) for name, value in given.items())
        assert not any(value.is_inference() for value in after.values())


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.a, self.norm = nn.Embedding(64, 64), nn.Linear(64, 64), nn.LayerNorm(64)
        self.b = nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x if x.is_floating_point() else self.embed(x)
        result: Tensor = self.b(self.norm(torch.relu(self.a(x))))
        return result


X = torch.linspace(-1, 1, 3 * 64).reshape(3, 64)
AWAY = dict.fromkeys(("embed", "a", "norm", "b"), "SSD")
PLACES: dict[str, tuple[dict[str, Any], float]] = {
    "resident": ({"budget": EVERYTHING}, 0),
    "streamed": ({"hints": AWAY}, 0),
    "emulated": ({"hints": AWAY, "mode": "emulated"}, 0),
    "int8": ({"budget": EVERYTHING, "precision": "int8"}, 0.02),
    "int4": ({"budget": EVERYTHING, "precision": "int4"}, 0.25),
    "int8, streamed": ({"hints": AWAY, "precision": "int8"}, 0.02),
}


def with_duals(model: nn.Module) -> Tensor:
    with forward_ad.dual_level():
        result = forward_ad.unpack_dual(model(forward_ad.make_dual(X, X)))
        return torch.stack([result.primal, result.tangent])


WORKING: dict[str, Callable[[nn.Module], Any]] = {
    "vmap": lambda model: torch.func.vmap(model)(X),
    "vmap of lookups": lambda model: torch.func.vmap(model)(torch.arange(6).view(3, 2)),
    "vmap of vmap": lambda model: torch.func.vmap(torch.func.vmap(model))(X[None]),
    "dual numbers": with_duals,
}
REFUSED: dict[str, Callable[[nn.Module], Any]] = {
    "grad": lambda model: torch.func.grad(lambda x: model(x).sum())(X),
    "vjp": lambda model: torch.func.vjp(model, X),
    "jvp": lambda model: torch.func.jvp(model, (X,), (X,)),
    "jacrev": lambda model: torch.func.jacrev(model)(X),
    "jacfwd": lambda model: torch.func.jacfwd(model)(X),
    "hessian": lambda model: torch.func.hessian(lambda x: model(x).sum())(X),
    "linearize": lambda model: torch.func.linearize(model, X),
    "functionalize": lambda model: torch.func.functionalize(model)(X),
    "jacobian": lambda model: torch.autograd.functional.jacobian(model, X),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("transform", WORKING)
@torch.no_grad()
def test_a_batch_of_calls_and_dual_numbers_are_right(transform: str, place: str) -> None:
    options, tolerance = PLACES[place]
    expected, model = WORKING[transform](Small()), Small()
    with attach(model, **options):
        before = model(X)
        found = WORKING[transform](model)
        assert (found - expected).norm() <= tolerance * expected.norm()
        assert torch.equal(model(X), before)
    assert torch.equal(model(X), Small()(X))


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("transform", REFUSED)
def test_transforms_that_would_keep_weights_are_refused(
    transform: str, place: str, gradients: bool
) -> None:
    model = Small()
    with attach(model, **PLACES[place][0]):
        with torch.no_grad():
            before = model(X)
        with torch.set_grad_enabled(gradients), pytest.raises(PlacementError, match="detach"):
            REFUSED[transform](model)
        if gradients:
            with pytest.raises(PlacementError, match=r"vmap under torch\.no_grad"):
                torch.func.vmap(model)(X)
        with torch.no_grad():
            assert torch.equal(model(X), before)
    with torch.no_grad():
        assert torch.equal(model(X), Small()(X))
