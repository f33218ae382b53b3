"""Uses that no plan foresees: several modules' weights at a time, a weight of which only rows or
products were to be computed, a module that runs inside another one's call. They are met within the
budget, or refused with the smallest budget that works.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from smallest_budget import named, smallest
from torch import Tensor, nn
from torch.nn import functional as F

from lib.errors import PlacementError
from lib.tiering import Runtime, attach
from lib.units import parse_bytes

WIDTH = 64


class Uses(nn.Module):
    """Layers of modules whose weights are used in a way that is given."""

    def __init__(self, use: Callable[["Layer", Tensor], Tensor], num_layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(use, 3 * index) for index in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Layer(nn.Module):
    """Modules that are blocks of their own, of a size that grows from layer to layer."""

    def __init__(self, use: Callable[["Layer", Tensor], Tensor], more: int) -> None:
        super().__init__()
        self.use = use
        self.base = nn.Linear(WIDTH, WIDTH)
        self.down = nn.Linear(WIDTH, 8 + more, bias=False)
        self.up = nn.Linear(8 + more, WIDTH, bias=False)
        self.magnitude = nn.ParameterList([torch.rand(WIDTH)])
        self.table = nn.Embedding(40 + more, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.use(self, x), dim=-1)


def dora(layer: Layer, x: Tensor) -> Tensor:
    weight = layer.base.weight + layer.up.weight @ layer.down.weight
    scale = layer.magnitude[0] / weight.norm(dim=1)
    return layer.base(x) * scale + layer.up(layer.down(x))


class Nested(nn.Module):
    """Calls a function while its own weight is held."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH))

    def forward(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return self.weight * function(x)


def inside_another_call(layer: Layer, x: Tensor) -> Tensor:
    """A hook of one module calls another one."""
    handle = layer.base.register_forward_hook(
        lambda module, args, output: output + layer.up(layer.down(args[0]))
    )
    try:
        return layer.base(x)
    finally:
        handle.remove()


USES: dict[str, Callable[[Layer, Tensor], Tensor]] = {
    "dora": dora,
    "one expression": lambda layer, x: x @ (layer.base.weight + layer.up.weight.sum()),
    "one operation": lambda layer, x: (
        x
        @ torch.cat([layer.up.weight, layer.down.weight.t()], 1)
        @ torch.ones(16 + 2 * (layer.down.out_features - 8), WIDTH)
    ),
    "another module's norm": lambda layer, x: x + layer.norm(layer.table.weight)[:1],
    "an embedding multiplied with": lambda layer, x: F.linear(x, layer.table.weight).sum() + x,
    "an embedding whole": lambda layer, x: x + layer.table.weight.mean(0) + layer.base(x),
    "a parent that takes a weight": lambda layer, x: F.linear(x, layer.base.weight.t()),
    "a product with a transposed weight": lambda layer, x: layer.base(x) @ layer.base.weight.t(),
    "inside another call": inside_another_call,
}


def run(model: nn.Module, *given: Tensor) -> Tensor:
    with torch.no_grad():
        found = model(*given)
    return found if isinstance(found, Tensor) else found[0]


def check_peak(runtime: Runtime) -> None:
    limit = runtime.budget["HBM"]
    assert limit is not None
    assert runtime.stats().peak_resident_bytes <= limit
    assert runtime.plan.fast_bytes <= limit


def run_in_the_budget_that_is_named(
    model: nn.Module, x: Tensor, precision: str | None, folder: Path
) -> Tensor:
    """Run in the smallest budget; where it doesn't do, in the one that the refusal names."""
    budget = smallest(model, precision)
    for _ in range(2):
        with attach(
            model, budget={"HBM": budget, "SSD": None}, precision=precision, spill_dir=folder
        ) as runtime:
            try:
                found = run(model, x)
            except PlacementError as refusal:
                check_peak(runtime)
                assert parse_bytes(named(refusal)) > parse_bytes(budget)
                budget = named(refusal)
                continue
            again = run(model, x)
            torch.testing.assert_close(again, found, rtol=0, atol=0)
            check_peak(runtime)
            return found
    raise AssertionError(f"HBM={budget} was named as the smallest, and is too small")


@pytest.mark.parametrize("precision", [None, "int8", "int4"])
@pytest.mark.parametrize("use", USES)
def test_the_smallest_budget_that_is_named_works(
    use: str, precision: str | None, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x = Uses(USES[use]), torch.randn(2, WIDTH)
    expected = run(model, x)
    found = run_in_the_budget_that_is_named(model, x, precision, tmp_path)
    if precision is None:
        assert torch.equal(found, expected)
    assert torch.equal(run(model, x), expected)
