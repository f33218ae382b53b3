"""Plans for a mixture's benchmark: the emulated link, and budgets with so much room for experts."""

from pathlib import Path
from typing import Any

from torch import nn

from lib.errors import InputError
from lib.tiering import EmulationSpec, TierSpec, attach, plan
from lib.vocabulary import Tier


def make_spec(bytes_per_second: float) -> EmulationSpec:
    """Return a machine with a link of that speed, where what resides costs nothing more."""
    return EmulationSpec(
        specs={
            Tier.HBM: TierSpec("HBM", 0, 1e6),
            Tier.SSD: TierSpec("link", 0, bytes_per_second / 1e9),
        },
        charge_hbm=False,
    )


def make_plan(model: nn.Module, hints: Path | None, budget: int, spec: EmulationSpec) -> Any:
    """Return the plan of a budget."""
    budgets = {"HBM": budget, "SSD": None}
    return plan(model, hints, budget=budgets, mode="emulated", emulation=spec).plan


def measure_experts(model: Any, hints: Path | None) -> tuple[int, int, int]:
    """Return the bytes of an expert, their number, and that of the layers that have them."""
    with attach(
        model, hints, budget={"HBM": None, "SSD": None}, mode="emulated", emulation=make_spec(1e9)
    ) as runtime:
        packed = runtime._keeper.residency.packed
        sizes = {each.payload.num_bytes for layer in packed for each in layer.experts}
    if len(sizes) != 1:
        raise InputError(
            "the model has no experts that move one by one, or of several sizes: give a mixture "
            "of transformers with packed experts"
        )
    return sizes.pop(), sum(len(layer.experts) for layer in packed), len(packed)


def smallest_budget(model: nn.Module, hints: Path | None, spec: EmulationSpec) -> int:
    """Return a budget with which a plan is found, within 2 %."""
    low, high = 0, sum(each.numel() * each.element_size() for each in model.parameters()) * 2
    while high - low > 0.02 * high:
        middle = (low + high) // 2
        try:
            make_plan(model, hints, middle, spec)
            high = middle
        except InputError:
            low = middle
    return high
