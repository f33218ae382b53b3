"""From the measured checkpoints to means with confidence intervals, and to a verdict.

The unit is the training run: intervals are percentile bootstraps over runs, so that many
measurements of one model don't pass for many models. Variants are compared with the base run of
their own seed. What the verdict asks for was fixed before anything was measured.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lib.precision.quality import bootstrap_interval

Fields = dict[str, Any]

LARGEST_LOSS = 1.05
"""KL of the plan by Adam's moment over that of the plan by the true Fisher, at equal bytes."""
LARGEST_RHO_LOSS = 0.02
LARGEST_STEPS = 0.25
"""Mean distance of the floors, in precisions."""
SCALE_RANGE = (0.8, 1.25)
"""Of measured over predicted KL, for the moment to be used without a calibration."""


def summarize(runs: Sequence[Fields]) -> Fields:
    """Return the summary of all runs that were measured.

    ``final``: over base runs and other sizes, at their last step; ``by_step``: over the base runs;
    ``variants``: each variant's difference from the base run of its seed, at the last step.
    """
    plain = [run for run in runs if run["variant"] == "base"]
    base = [run for run in plain if run["size"] == "base"]
    final = [flatten(run["checkpoints"][-1]) for run in plain]
    steps = sorted({point["step"] for run in base for point in run["checkpoints"]})
    return {
        "final": _describe(final),
        "by_step": {
            str(step): _describe(
                [
                    flatten(point)
                    for run in base
                    for point in run["checkpoints"]
                    if point["step"] == step
                ]
            )
            for step in steps
        },
        "variants": {
            variant: _describe(_differences(variant, runs, base))
            for variant in dict.fromkeys(run["variant"] for run in runs)
            if variant != "base"
        },
        "verdict": judge(final),
    }


def judge(points: Sequence[Mapping[str, float]]) -> Fields:
    """Return each criterion with its figure, interval and limit; it is met if the whole interval
    is within the limit.
    """
    rho = [p["blocks.adam.within"] - p["blocks.fisher_true.within"] for p in points]
    criteria: Fields = {
        "rank correlation with measured KL, Adam's less the true Fisher's": _criterion(
            rho, lambda low, high: low >= -LARGEST_RHO_LOSS, f"at least -{LARGEST_RHO_LOSS}"
        )
    }
    for path in [p for p in points[0] if p.startswith("allocation.") and p.endswith(".over_true")]:
        _, *bits, signal, _ = path.split(".")
        if signal == "adam":
            criteria[f"KL of Adam's plan over the true Fisher's at {'.'.join(bits)} bits"] = (
                _criterion(
                    [p[path] for p in points],
                    lambda low, high: high <= LARGEST_LOSS,
                    f"at most {LARGEST_LOSS}",
                )
            )
    for path in [p for p in points[0] if p.startswith("floors.") and p.endswith(".adam.steps")]:
        epsilon = path.removeprefix("floors.").removesuffix(".adam.steps")
        criteria[f"distance of Adam's floors from the true Fisher's at epsilon {epsilon}"] = (
            _criterion(
                [p[path] for p in points],
                lambda low, high: high <= LARGEST_STEPS,
                f"at most {LARGEST_STEPS} precisions",
            )
        )
    low_limit, high_limit = SCALE_RANGE
    criteria["measured over predicted KL by Adam, uncalibrated"] = _criterion(
        [p["blocks.adam.measured_over_predicted"] for p in points],
        lambda low, high: low >= low_limit and high <= high_limit,
        f"from {low_limit} to {high_limit}",
    )
    return criteria


def flatten(document: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the numbers of a nested document by dotted path."""
    return dict(_walk(document, prefix))


def _walk(document: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for key, value in document.items():
        if isinstance(value, Mapping):
            yield from _walk(value, f"{prefix}{key}.")
        elif isinstance(value, int | float):
            yield f"{prefix}{key}", float(value)


def _describe(points: Sequence[Mapping[str, float]]) -> Fields:
    """Return mean, interval, range and number of each figure that all points have."""
    shared = [path for path in (points[0] if points else {}) if all(path in p for p in points)]
    return {path: _statistics([p[path] for p in points]) for path in shared}


def _statistics(values: Sequence[float]) -> Fields:
    interval = bootstrap_interval(values)
    return {
        "mean": float(np.mean(values)),
        "interval": None if interval is None else list(interval),
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }


def _differences(
    variant: str, runs: Sequence[Fields], base: Sequence[Fields]
) -> list[dict[str, float]]:
    own = {(run["corpus"], run["seed"]): flatten(run["checkpoints"][-1]) for run in base}
    found = []
    for run in runs:
        other = own.get((run["corpus"], run["seed"]))
        if run["variant"] == variant and other is not None:
            point = flatten(run["checkpoints"][-1])
            found.append({path: point[path] - other[path] for path in point if path in other})
    return found


def _criterion(
    values: Sequence[float], holds: Callable[[float, float], bool], limit: str
) -> Fields:
    figures = _statistics(values)
    low, high = figures["interval"] or (figures["mean"], figures["mean"])
    return {**figures, "limit": limit, "met": bool(holds(low, high))}
