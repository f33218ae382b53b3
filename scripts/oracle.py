"""The ground truth: every block at every precision measured, and how well signals predict it."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from tqdm import tqdm

from lib.blocks import partition_model
from lib.hints import Precision
from lib.precision.allocate import Option, allocate
from lib.precision.calibration import Calibration, spearman
from lib.precision.perturb import curve_precisions, lossy_blocks
from lib.precision.quality import Quality, measure_perturbations
from lib.precision.sensitivity import Curves
from lib.precision.storage import stored_bytes
from scripts.predictions import Pair, Predictions

BUDGET_BITS = (3.0, 4.0, 5.0, 6.0)
"""Average bits per weight, scales included, of the plans that are measured as a whole."""
Fields = dict[str, Any]


def measure(
    model: Any, batches: Sequence[Tensor], choices: Sequence[Mapping[str, Precision]]
) -> list[Quality]:
    """Measure choices of precisions, with a bar."""
    with progress_bar(len(batches) * len(choices), "measuring") as bar:
        return measure_perturbations(model, batches, choices, progress=bar.update)


def rank_signals(predictions: Predictions, pairs: Sequence[Pair], kl: Sequence[float]) -> Fields:
    """Return Spearman's correlation with the measured KL: over all pairs, and per precision.

    Only pairs that every signal has a prediction for; a signal that can't be had here is null.
    """
    names = [*predictions.curves, *predictions.missing]
    known = [
        (pair, value)
        for pair, value in zip(pairs, kl, strict=True)
        if all(pair[0] in curves for curves in predictions.curves.values())
    ]

    def correlate(rows: Sequence[tuple[Pair, float]]) -> dict[str, float | None]:
        values = [value for _, value in rows]
        return {
            name: spearman([predictions.curves[name][b][p] for (b, p), _ in rows], values)
            if name in predictions.curves and len(rows) > 1
            else None
            for name in names
        }

    precisions = sorted({precision for _, precision in pairs}, key=list(Precision).index)
    return {
        "spearman": correlate(known),
        "within_precision": {
            str(precision): correlate([row for row in known if row[0][1] == precision])
            for precision in precisions
        },
        "pairs": len(known),
    }


def check_additivity(
    model: Any,
    batches: Sequence[Tensor],
    upper: Curves,
    final: Calibration,
    singles: Mapping[Pair, float],
) -> list[Fields]:
    """Measure all blocks together, uniform and allocated to a budget, beside the sum of singles."""
    plans: list[tuple[str, dict[str, Precision]]] = []
    for precision in curve_precisions(model):
        names = [block.name for block in lossy_blocks(model, precision)]
        plans.append((f"uniform {precision}", dict.fromkeys(names, precision)))
    for bits in BUDGET_BITS:
        if (plan := allocate_bits(model, upper, bits)) is not None:
            plans.append((f"{bits:g} bits per weight", plan))
    measured = measure(model, batches, [plan for _, plan in plans])
    rows = []
    for (name, plan), quality in zip(plans, measured, strict=True):
        sum_of_singles = sum(singles.get(pair, 0.0) for pair in plan.items())
        if not sum_of_singles:
            continue  # a precision that the weights have already
        predicted = sum(upper[block][precision] for block, precision in plan.items()) * final.scale
        rows.append(
            {
                "plan": name,
                "joint_kl": quality.kl_nats,
                "joint_interval": None if quality.kl_interval is None else [*quality.kl_interval],
                "sum_of_singles": sum_of_singles,
                "joint_over_sum": quality.kl_nats / sum_of_singles,
                "predicted": predicted,
                "predicted_over_joint": predicted / quality.kl_nats,
                "perplexity": quality.perplexity,
                "reference_perplexity": quality.reference_perplexity,
            }
        )
    return rows


def allocate_bits(model: Any, upper: Curves, bits: float) -> dict[str, Precision] | None:
    """Return the precisions of least predicted KL whose records take ``bits`` per weight; None
    where even the smallest take more (scales and headers of small matrices).
    """
    blocks = [block for block in partition_model(model) if upper[block.name][Precision.INT2] > 0]
    options = {
        block.name: [
            Option(precision, stored_bytes(model, block, precision), kl)
            for precision, kl in upper[block.name].items()
        ]
        for block in blocks
    }
    budget = bits / 8 * sum(block.num_params for block in blocks)
    smallest = sum(min(option.cost for option in choices) for choices in options.values())
    return allocate(options, cost_budget=budget).precisions if smallest <= budget else None


def progress_bar(total: int, name: str) -> "tqdm[Any]":
    return tqdm(total=total, desc=name, disable=not sys.stderr.isatty(), leave=False)
