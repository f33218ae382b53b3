"""What each signal decides at one checkpoint: precisions at equal bytes and floors under one
epsilon, measured on the running model, all blocks together.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lib.precision.allocate import allocate_precisions
from lib.precision.floors import Curve, JointCheck, make_ledger
from lib.precision.quality import measure_perturbations
from lib.precision.sensitivity import Curves, monotone
from lib.precision.sizes import PrecisionMap, StoredSizes
from lib.vocabulary import Precision
from scripts.experiments.allocations.controls import raise_at_random

PRECISIONS = (
    Precision.INT8,
    Precision.INT6,
    Precision.INT5,
    Precision.INT4,
    Precision.INT3,
    Precision.INT2,
)
BITS = (3.0, 4.0, 5.0)
EPSILONS = (0.01, 0.05)
"""Of the floors that are compared, in nats per token."""
Fields = dict[str, Any]


class Meter:
    """Measures plans on one text; each different one once."""

    def __init__(self, model: Any, tokens: Tensor) -> None:
        self._model = model
        self._batches = torch.split(tokens, 32)
        self._known: dict[frozenset[tuple[str, Precision]], float] = {}

    def measure(self, plans: Sequence[PrecisionMap]) -> list[float]:
        """Return the KL of each plan; what stays in fp32 is left as it is."""
        keys = [
            frozenset((name, p) for name, p in plan.items() if p is not Precision.FP32)
            for plan in plans
        ]
        missing = [key for key in dict.fromkeys(keys) if key not in self._known]
        measured = measure_perturbations(self._model, self._batches, [dict(key) for key in missing])
        self._known |= {key: q.kl_nats for key, q in zip(missing, measured, strict=True)}
        return [self._known[key] for key in keys]

    def oracle(self, sizes: StoredSizes) -> Curves:
        """Return the KL of every block and precision alone."""
        pairs = list(sizes.num_bytes)
        kl = dict(zip(pairs, self.measure([{b: p} for b, p in pairs]), strict=True))
        return {name: {p: kl[name, p] for p in PRECISIONS} for name in sizes.num_params}


def compare_allocations(
    curves: Mapping[str, Curves], sizes: StoredSizes, meter: Meter, *, seed: int
) -> Fields:
    """Measure the plans of least predicted KL by each signal, all within the same bytes; ``random``
    is a plan without a signal that fills them.

    ``over_true``: KL over that of the true Fisher's plan; ``same``: share of blocks to which both
    give the same precision.
    """
    result: Fields = {}
    for bits in BITS:
        budget = sizes.budget(bits)
        plans = {
            signal: allocate_precisions(sizes.options(own), cost_budget=budget).precisions
            for signal, own in curves.items()
        }
        options = sizes.options(curves["magnitude"])
        plans["random"] = raise_at_random(options, cost_budget=budget, seed=seed)
        kl = dict(zip(plans, meter.measure(list(plans.values())), strict=True))
        result[str(bits)] = {
            signal: {
                "kl": kl[signal],
                "over_true": kl[signal] / kl["fisher_true"],
                "same": _same(plan, plans["fisher_true"]),
            }
            for signal, plan in plans.items()
        }
    return result


def compare_floors(curves: Mapping[str, Curves], sizes: StoredSizes, meter: Meter) -> Fields:
    """Measure the floors that each signal gives for one epsilon, its scale fitted by one number to
    the single blocks' KL, which is of other text than what the meter measures on.

    ``same`` and ``steps``: share of blocks with the true Fisher's floor, and mean distance to it in
    precisions; ``bits``: bits per weight if every block is held at its floor, ``kl``: what that
    costs.
    """
    oracle = curves["oracle"]
    result: Fields = {}
    for epsilon in EPSILONS:
        plans = {}
        for signal, own in curves.items():
            ratios = [
                oracle[name][precision] / own[name][precision]
                for name in sizes.num_params
                for precision in PRECISIONS
            ]
            scale = float(np.median(ratios))
            ledger = make_ledger(
                {name: _floor_curve(own[name], name, sizes, scale) for name in sizes.num_params},
                epsilon=epsilon,
                factor=1.0,
                joint_check=JointCheck.PENDING,
            )
            plans[signal] = dict(ledger.floors)
        kl = dict(zip(plans, meter.measure(list(plans.values())), strict=True))
        order = [Precision.FP32, *PRECISIONS]
        result[str(epsilon)] = {
            signal: {
                "kl": kl[signal],
                "bits": _bits_per_weight(sizes, plan),
                "same": _same(plan, plans["fisher_true"]),
                "steps": float(
                    np.mean(
                        [
                            abs(order.index(p) - order.index(plans["fisher_true"][name]))
                            for name, p in plan.items()
                        ]
                    )
                ),
            }
            for signal, plan in plans.items()
        }
    return result


def _floor_curve(
    curve: Mapping[Precision, float], name: str, sizes: StoredSizes, scale: float
) -> Curve:
    cost: dict[Precision, float] = {p: sizes.num_bytes[name, p] for p in PRECISIONS}
    return Curve(
        native=Precision.FP32,
        kl_nats=monotone({p: kl * scale for p, kl in curve.items()}),
        cost={**cost, Precision.FP32: 4.0 * sizes.num_params[name]},
    )


def _bits_per_weight(sizes: StoredSizes, plan: PrecisionMap) -> float:
    num_bytes = sum(
        4 * sizes.num_params[name] if p is Precision.FP32 else sizes.num_bytes[name, p]
        for name, p in plan.items()
    )
    return 8 * num_bytes / sum(sizes.num_params.values())


def _same(plan: PrecisionMap, other: PrecisionMap) -> float:
    return sum(plan[name] is other[name] for name in plan) / len(plan)
