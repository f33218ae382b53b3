"""From the measured checkpoints to means with confidence intervals, and to a verdict.

Runs that share corpus and seed see the same text in the same order, and aren't independent models:
what is drawn again in the bootstrap is such a *cluster*, with all its runs. There are few of them,
so the percentiles are those of Hesterberg's expanded interval (2015, arXiv 1411.5279, section 5.3),
which for a mean is about as wide as Student's: the plain percentiles of n clusters are too narrow
by sqrt((n - 1) / n) z / t. Variants are compared with the base run of their own seed.

What the verdict asks for was fixed before anything was measured; of caches, later, when those of
one checkpoint had been seen, with the limit of the plans.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Fields = dict[str, Any]
Cluster = tuple[str, int]
"""Corpus and seed."""

LARGEST_LOSS = 1.05
"""KL of the plan by Adam's moment over that of the plan by the true Fisher, at equal bytes."""
CACHES = {"keep_one": "one full layer", "keep_half": "half full", "mixed": "3 bits on average"}
CONFIDENCE = 0.95
_RESAMPLES = 20_000
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
    final = [(_cluster(run), flatten(run["checkpoints"][-1])) for run in plain]
    steps = sorted({point["step"] for run in base for point in run["checkpoints"]})
    return {
        "final": _describe(final),
        "by_step": {
            str(step): _describe(
                [
                    (_cluster(run), flatten(point))
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


def judge(runs: Sequence[tuple[Cluster, Mapping[str, float]]]) -> Fields:
    """Return each criterion with its figure, interval and limit; it is met if the whole interval
    is within the limit.
    """
    clusters, points = zip(*runs, strict=True)
    rho = [p["blocks.adam.within"] - p["blocks.fisher_true.within"] for p in points]
    criteria: Fields = {
        "rank correlation with measured KL, Adam's less the true Fisher's": _criterion(
            rho,
            clusters,
            lambda low, high: low >= -LARGEST_RHO_LOSS,
            f"at least -{LARGEST_RHO_LOSS}",
        )
    }
    for path in [p for p in points[0] if p.startswith("allocation.") and p.endswith(".over_true")]:
        _, *bits, signal, _ = path.split(".")
        if signal == "adam":
            criteria[f"KL of Adam's plan over the true Fisher's at {'.'.join(bits)} bits"] = (
                _criterion(
                    [p[path] for p in points],
                    clusters,
                    lambda low, high: high <= LARGEST_LOSS,
                    f"at most {LARGEST_LOSS}",
                )
            )
    for path in [p for p in points[0] if p.startswith("floors.") and p.endswith(".adam.steps")]:
        epsilon = path.removeprefix("floors.").removesuffix(".adam.steps")
        criteria[f"distance of Adam's floors from the true Fisher's at epsilon {epsilon}"] = (
            _criterion(
                [p[path] for p in points],
                clusters,
                lambda low, high: high <= LARGEST_STEPS,
                f"at most {LARGEST_STEPS} precisions",
            )
        )
    low_limit, high_limit = SCALE_RANGE
    criteria["measured over predicted KL by Adam, uncalibrated"] = _criterion(
        [p["blocks.adam.measured_over_predicted"] for p in points],
        clusters,
        lambda low, high: low >= low_limit and high <= high_limit,
        f"from {low_limit} to {high_limit}",
    )
    for name, words in CACHES.items():
        path = f"caches.{name}.adam.over_true"
        criteria[f"KL of Adam's cache over the true Fisher's, {words}"] = _criterion(
            [p[path] for p in points],
            clusters,
            lambda low, high: high <= LARGEST_LOSS,
            f"at most {LARGEST_LOSS}",
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


def cluster_interval(
    values: Sequence[float], clusters: Sequence[Cluster]
) -> tuple[float, float] | None:
    """Return the expanded percentile interval of the mean, clusters drawn again; None for a single
    cluster.
    """
    names = sorted(set(clusters))
    if len(names) < 2:
        return None
    index = [names.index(cluster) for cluster in clusters]
    sums, sizes = np.bincount(index, weights=values), np.bincount(index)
    counts = _resampled(len(names))
    low, high = np.quantile((counts @ sums) / (counts @ sizes), _percentiles(len(names)))
    return float(low), float(high)


@lru_cache
def _resampled(count: int) -> NDArray[Any]:
    """Return how often each of ``count`` clusters is drawn, for each resample."""
    return np.random.default_rng(0).multinomial(count, [1 / count] * count, size=_RESAMPLES)


def _percentiles(count: int) -> tuple[float, float]:
    """Return Phi(-+ sqrt(n / (n - 1)) t), t of n - 1 degrees of freedom by Abramowitz & Stegun
    26.7.5.
    """
    normal, free = NormalDist(), count - 1
    z = normal.inv_cdf((1 + CONFIDENCE) / 2)
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * free**3)
    tail = normal.cdf(-math.sqrt(count / free) * t)
    return tail, 1 - tail


def _cluster(run: Mapping[str, Any]) -> Cluster:
    return run["corpus"], run["seed"]


def _describe(runs: Sequence[tuple[Cluster, Mapping[str, float]]]) -> Fields:
    """Return mean, interval, range and number of each figure that all runs have."""
    if not runs:
        return {}
    clusters, points = zip(*runs, strict=True)
    shared = [path for path in points[0] if all(path in p for p in points)]
    return {path: _statistics([p[path] for p in points], clusters) for path in shared}


def _statistics(values: Sequence[float], clusters: Sequence[Cluster]) -> Fields:
    interval = cluster_interval(values, clusters)
    return {
        "mean": float(np.mean(values)),
        "interval": None if interval is None else list(interval),
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }


def _differences(
    variant: str, runs: Sequence[Fields], base: Sequence[Fields]
) -> list[tuple[Cluster, dict[str, float]]]:
    own = {_cluster(run): flatten(run["checkpoints"][-1]) for run in base}
    found = []
    for run in runs:
        other = own.get(_cluster(run))
        if run["variant"] == variant and other is not None:
            point = flatten(run["checkpoints"][-1])
            change = {path: point[path] - other[path] for path in point if path in other}
            found.append((_cluster(run), change))
    return found


def _criterion(
    values: Sequence[float],
    clusters: Sequence[Cluster],
    holds: Callable[[float, float], bool],
    limit: str,
) -> Fields:
    figures = _statistics(values, clusters)
    low, high = figures["interval"] or (figures["mean"], figures["mean"])
    by_corpus = {
        corpus: float(np.mean([v for v, c in zip(values, clusters, strict=True) if c[0] == corpus]))
        for corpus in dict.fromkeys(corpus for corpus, _ in clusters)
    }
    return {
        **figures,
        "clusters": len(set(clusters)),
        "by_corpus": by_corpus,
        "limit": limit,
        "met": bool(holds(low, high)),
    }
