"""Random plans of the kind that the ledger admits: what its sum of bounds has to hold for.

A ledger bounds the KL of a whole plan that an allocation chose, which isn't a sum over random
pairs: of noisy predictions an allocation takes those that came out too low, and the KL of a plan
isn't quite the sum over its blocks. So plans are drawn as ledgers choose them: the fewest bytes
within a bound. Random are the bound (log-uniform, from the least that compresses anything to what
all blocks cost at their lowest precision) and what a byte of each block costs (log-normal, since
runtimes stream some blocks and keep others, and look up few rows of a third).
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import nn

from ..blocks import partition_model
from ..codecs.storage import native_precision
from ..vocabulary import Precision
from .allocate import Option, allocate_precisions
from .sensitivity import Curves
from .sizes import PrecisionMap, StoredSizes

_COST_SPREAD = 1.0
"""Standard deviation of the logarithm of what a byte costs: a factor of e."""


def draw_precisions(
    model: nn.Module, sizes: StoredSizes, curves: Curves, *, count: int, seed: int
) -> list[PrecisionMap]:
    """Return plans that change some weights; blocks that stay as they are aren't in them."""
    options = _with_native(model, sizes, curves)
    lossy = [[option.kl for option in choices if option.kl > 0] for choices in options.values()]
    least = min(kl for block in lossy for kl in block)
    most = math.fsum(max(block, default=0.0) for block in lossy)
    random = np.random.default_rng(seed)
    plans: list[PrecisionMap] = []
    while len(plans) < count:
        epsilon = math.exp(random.uniform(math.log(least), math.log(most)))
        prices = np.exp(random.normal(0, _COST_SPREAD, len(options)))
        priced = {
            name: [replace(option, cost=option.cost * price) for option in choices]
            for (name, choices), price in zip(options.items(), prices, strict=True)
        }
        chosen = allocate_precisions(priced, kl_budget=epsilon).options
        plan = {name: o.precision for name, o in chosen.items() if o.precision in curves[name]}
        if any(chosen[name].kl > 0 for name in plan):
            plans.append(plan)
    return plans


def predicted_kl(curves: Curves, plan: PrecisionMap) -> float:
    """Return the sum of what curves predict for the blocks of a plan."""
    return math.fsum(curves[block][precision] for block, precision in plan.items())


def _with_native(
    model: nn.Module, sizes: StoredSizes, curves: Curves
) -> dict[str, Sequence[Option]]:
    """Return each block's options, the lossless one first."""
    native_bytes = {block.name: block.num_bytes for block in partition_model(model)}
    native = native_precision(next(model.parameters()).dtype)
    assert Precision(native) not in sizes.precisions
    return {
        name: [Option(native, native_bytes[name], 0.0), *choices]
        for name, choices in sizes.options(curves).items()
    }
