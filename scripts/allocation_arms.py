"""The allocations that ours is compared with, and the curves that ours is made of."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lib.errors import InputError
from lib.hints import Hints
from lib.precision.allocate import allocate
from lib.precision.calibration import PROBES, calibrate
from lib.precision.controls import (
    ends_first,
    inverse_givers,
    permute_curves,
    raise_at_random,
    raise_in_order,
    random_order,
    shuffled_givers,
)
from lib.precision.sensitivity import Curves
from lib.precision.sizes import Plan, StoredSizes
from scripts.oracle import measure, progress_bar
from scripts.predictions import (
    calibrate_signals,
    list_pairs,
    measuring_batches,
    predict,
    upper_curves,
)

DRAWS = 10
"""Allocations of each arm that is random; its figures are means."""
DRAWN = ("uniform", "random", "shuffled")
FISHER_DRAWS = 256


def check_budgets(sizes: StoredSizes, budgets: Sequence[float]) -> None:
    """Raise InputError for a budget outside the uniform widths, which have no chord there."""
    highest, *_, lowest = [sizes.bits_of(sizes.uniform(p)) for p in sizes.precisions]
    for bits in budgets:
        if not lowest <= bits <= highest:
            raise InputError(
                f"--bits {bits:g} lies outside this model's uniform widths, {lowest:.3f} to "
                f"{highest:.3f} bits per weight"
            )


def plan_arms(
    sizes: StoredSizes, signals: Mapping[str, Curves], *, bits: float, seed: int
) -> dict[str, list[Plan]]:
    """Return the plans of each arm within a budget; ``signals`` must have "ours"."""
    budget = sizes.budget(bits)
    names = list(sizes.num_params)
    own = sizes.options(signals["ours"])
    seeds = range(seed, seed + DRAWS)
    arms: dict[str, list[Plan]] = {
        signal: [allocate(sizes.options(curves), cost_budget=budget).precisions]
        for signal, curves in signals.items()
    }
    arms["depth"] = [raise_in_order(own, ends_first(names), cost_budget=budget)]
    inverse = permute_curves(own, sizes.num_params, inverse_givers(own, sizes.num_params))
    arms["inverse"] = [allocate(inverse, cost_budget=budget).precisions]
    arms["uniform"] = [
        raise_in_order(own, random_order(names, seed=s), cost_budget=budget) for s in seeds
    ]
    arms["random"] = [raise_at_random(own, cost_budget=budget, seed=s) for s in seeds]
    arms["shuffled"] = [
        allocate(
            permute_curves(own, sizes.num_params, shuffled_givers(names, seed=s)),
            cost_budget=budget,
        ).precisions
        for s in seeds
    ]
    return arms


def hint_curves(hints: Hints, sizes: StoredSizes) -> Curves | None:
    """Return the hints' calibrated curves; None if they have none for a block."""
    if hints.quality.get("calibrated") is not True:
        return None
    curves = {name: hints.blocks[name].kl for name in sizes.num_params if name in hints.blocks}
    known = all(set(sizes.precisions) <= curves.get(name, {}).keys() for name in sizes.num_params)
    return curves if known else None


def compute_curves(
    model: Any, tokens: Tensor, vocab_size: int, *, folder: str, hints: Hints, seed: int
) -> Curves:
    """Return calibrated curves from Fisher information and probes on the same text (N, T)."""
    with progress_bar(FISHER_DRAWS, "gradients") as bar:
        predictions = predict(
            model,
            tokens,
            folder=folder,
            hints=hints,
            draws=FISHER_DRAWS,
            seed=seed,
            empirical=False,
            progress=bar.update,
        )
    pairs = list_pairs(model, seed=seed)[:PROBES]
    batches = measuring_batches(tokens, vocab_size)
    probes = measure(model, batches, [{block: precision} for block, precision in pairs])
    kl = [quality.kl_nats for quality in probes]
    upper = upper_curves(predictions, calibrate_signals(predictions, pairs, kl))
    scale = calibrate([upper[block][precision] for block, precision in pairs], kl).scale
    return {
        block: {precision: value * scale for precision, value in curve.items()}
        for block, curve in upper.items()
    }
