"""The ground truth: every block at every precision measured, and how well signals predict it."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..precision.allocate import allocate_precisions
from ..precision.plans import predicted_kl
from ..precision.quality import Quality, measure_perturbations
from ..precision.sensitivity import Curves
from ..precision.sizes import PrecisionMap, stored_sizes
from ..precision.tolerance import spearman
from ..progress import progress_bar
from ..vocabulary import Precision
from .predictions import Pair, Predictions

BUDGET_BITS = (3.0, 4.0, 5.0, 6.0)
"""Average bits per weight (``lib.precision.sizes``) of the plans that are measured as a whole."""
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
    curves: Curves,
    singles: Mapping[Pair, float],
    *,
    batches: Sequence[Tensor],
    judging: Sequence[Tensor],
) -> list[Fields]:
    """Measure all blocks together, uniform and allocated to a budget: on the text of ``singles``
    (``batches``) beside their sum, and on ``judging``, which nothing was fitted to, beside what
    ``curves`` predict.
    """
    sizes = stored_sizes(model, names=curves)
    plans: dict[str, PrecisionMap] = {}
    for precision in sizes.precisions:
        plans[f"uniform {precision}"] = sizes.uniform(precision)
    smallest = sizes.bits_of(sizes.uniform(sizes.precisions[-1]))
    for bits in BUDGET_BITS:
        if bits >= smallest:
            allocation = allocate_precisions(sizes.options(curves), cost_budget=sizes.budget(bits))
            plans[f"{bits:g} bits per weight"] = allocation.precisions
    # A precision that the weights have already costs nothing.
    plans = {
        name: plan
        for name, plan in plans.items()
        if any(singles.get(pair, 0.0) > 0 for pair in plan.items())
    }
    together = measure(model, batches, list(plans.values()))
    judged = measure(model, judging, list(plans.values()))
    rows = []
    for (name, plan), joint, unseen in zip(plans.items(), together, judged, strict=True):
        sum_of_singles = sum(singles.get(pair, 0.0) for pair in plan.items())
        predicted = predicted_kl(curves, plan)
        rows.append(
            {
                "plan": name,
                "bits": sizes.bits_of(plan),
                "joint_kl": joint.kl_nats,
                "sum_of_singles": sum_of_singles,
                "joint_over_sum": joint.kl_nats / sum_of_singles,
                "predicted": predicted,
                "judged_kl": unseen.kl_nats,
                "judged_interval": list(unseen.kl_interval or ()),
                "predicted_over_judged": predicted / unseen.kl_nats,
                "perplexity": unseen.perplexity,
                "reference_perplexity": unseen.reference_perplexity,
            }
        )
    return rows
