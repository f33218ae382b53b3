"""The allocations that ours is compared with."""

from collections.abc import Mapping, Sequence

from lib.errors import InputError
from lib.hints import Hints
from lib.precision.allocate import allocate_precisions
from lib.precision.sensitivity import Curves
from lib.precision.sizes import PrecisionMap, StoredSizes
from scripts.experiments.allocations.controls import (
    ends_first,
    inverse_givers,
    permute_curves,
    raise_at_random,
    raise_in_order,
    random_order,
    shuffled_givers,
)

DRAWS = 10
"""Allocations of each arm that is random; its figures are means."""
DRAWN = ("uniform", "random", "shuffled")


def choose_budgets(
    sizes: StoredSizes, asked: Sequence[float] | None, *, default: Sequence[float]
) -> list[float]:
    """Return what is asked for, or those of the default that lie within the uniform widths.

    Outside them there is no chord: InputError for one that is asked for, or if none is left.
    """
    widths = [sizes.bits_of(sizes.uniform(precision)) for precision in sizes.precisions]
    lowest, highest = min(widths, default=0.0), max(widths, default=0.0)
    within = [bits for bits in asked or default if lowest <= bits <= highest]
    outside = [bits for bits in asked or default if bits not in within]
    limits = f"this model's uniform widths, {lowest:.3f} to {highest:.3f} bits per weight"
    if asked and outside:
        raise InputError(f"--bits {outside[0]:g} lies outside {limits}")
    named = " ".join(f"{bits:g}" for bits in outside)
    if not within:
        raise InputError(f"the default budgets ({named}) lie outside {limits}: give --bits")
    if outside:
        print(f"left out of the default budgets: {named}, outside {limits}")
    return within


def plan_arms(
    sizes: StoredSizes, signals: Mapping[str, Curves], *, bits: float, seed: int
) -> dict[str, list[PrecisionMap]]:
    """Return the plans of each arm within a budget; ``signals`` must have "ours"."""
    budget = sizes.budget(bits)
    names = list(sizes.num_params)
    own = sizes.options(signals["ours"])
    seeds = range(seed, seed + DRAWS)
    arms: dict[str, list[PrecisionMap]] = {
        signal: [allocate_precisions(sizes.options(curves), cost_budget=budget).precisions]
        for signal, curves in signals.items()
    }
    arms["depth"] = [raise_in_order(own, ends_first(names), cost_budget=budget)]
    inverse = permute_curves(own, sizes.num_params, inverse_givers(own, sizes.num_params))
    arms["inverse"] = [allocate_precisions(inverse, cost_budget=budget).precisions]
    arms["uniform"] = [
        raise_in_order(own, random_order(names, seed=s), cost_budget=budget) for s in seeds
    ]
    arms["random"] = [raise_at_random(own, cost_budget=budget, seed=s) for s in seeds]
    arms["shuffled"] = [
        allocate_precisions(
            permute_curves(own, sizes.num_params, shuffled_givers(names, seed=s)),
            cost_budget=budget,
        ).precisions
        for s in seeds
    ]
    return arms


def hint_curves(hints: Hints, sizes: StoredSizes, *, digest: str) -> Curves | None:
    """Return the hints' curves if they were calibrated on the parts of the text that ``digest``
    names, whose third part they haven't seen; None if they may have, or lack a block's curve.

    A block that the text doesn't exercise has none.
    """
    quality = hints.quality
    if quality.get("calibrated") is not True or quality.get("text", {}).get("digest") != digest:
        return None
    names = [name for name in sizes.num_params if name not in quality.get("unexercised", ())]
    curves = {name: hints.blocks[name].kl for name in names if name in hints.blocks}
    known = all(set(sizes.precisions) <= curves.get(name, {}).keys() for name in names)
    return curves if known else None
