"""Curves of a model, predicted and calibrated, and the hints that they make."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..hints import Hints
from ..precision.plans import draw_precisions, predicted_kl
from ..precision.quality import Quality
from ..precision.sensitivity import Curves, monotone
from ..precision.sizes import PrecisionMap, stored_sizes
from ..precision.tolerance import (
    CONFIDENCE,
    COVERAGE,
    LARGEST_TRUSTED_FACTOR,
    PROBES,
    Calibration,
    calibrate,
    in_nats,
    tolerance_limit,
)
from ..progress import progress_bar
from .oracle import measure
from .predictions import (
    Pair,
    Predictions,
    calibrate_signals,
    list_pairs,
    measuring_batches,
    predict,
    upper_curves,
)

PLANS = 60
DRAWS = 256
"""Gradients with sampled labels: the directional estimate's standard error is 9 %."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibratedModel:
    """Everything that calibration predicted and measured."""

    predictions: Predictions
    calibrations: Mapping[str, Calibration]
    """The calibration of each signal by itself."""
    final: Calibration
    """The calibration of ``curves``."""
    curves: Curves
    """In nats: the larger of diagonal and directional estimate, on scale, never falling.
    Without the blocks that the text doesn't exercise."""
    unexercised: Sequence[str]
    """Blocks whose weights have no part in what the model says of the text: experts that no token
    is routed to. What their precision costs can't be known from it."""
    pairs: Sequence[Pair]
    """Those measured, in random order."""
    measured: Sequence[Quality]
    """Each with a KL above 0."""
    plans: Sequence[PrecisionMap]
    plan_ratios: Sequence[float]
    """Measured over predicted KL of each plan."""

    @property
    def plan_factor(self) -> float:
        """The factor that covers 95 % of plans that an allocation chooses, with 95 % confidence."""
        return tolerance_limit(self.plan_ratios)

    @property
    def factor(self) -> float:
        """What covers both pairs and plans."""
        return max(self.final.conformal_factor, self.plan_factor)


def calibrate_model(
    model: Any,
    fisher_text: Tensor,
    calibration_text: Tensor,
    *,
    folder: str,
    hints: Hints,
    vocab_size: int,
    draws: int = DRAWS,
    seed: int = 0,
    oracle: bool = False,
) -> CalibratedModel:
    """Predict on one text, measure on another (both (N, T)), and fit. The model is in float32.

    ``oracle``: measure every pair, and predict from the text's own labels as well.
    """
    with progress_bar(draws + (len(fisher_text) if oracle else 0), "gradients") as bar:
        predictions = predict(
            model,
            fisher_text,
            folder=folder,
            hints=hints,
            draws=draws,
            seed=seed,
            empirical=oracle,
            progress=bar.update,
        )
    pairs = list_pairs(model, seed=seed)
    blocks = {block for block, _ in pairs}
    pairs = [pair for pair in pairs if predictions.reaches(pair)]
    batches = measuring_batches(calibration_text, vocab_size)
    count = len(pairs) if oracle else PROBES
    measured, unchanged, all_pairs = _measure_probes(model, batches, pairs, count=count)
    reached = {block for block, _ in pairs} - (
        {block for block, _ in unchanged} - {block for block, _ in measured}
    )
    unexercised = sorted(blocks - reached)
    pairs, kl = list(measured), [quality.kl_nats for quality in measured.values()]
    calibrations = calibrate_signals(predictions, pairs, kl, all_pairs=all_pairs)
    upper = upper_curves(predictions, calibrations)
    final = calibrate([upper[block][p] for block, p in pairs], kl, all_pairs=all_pairs)
    curves = {
        block: monotone({p: in_nats(value, final.scale) for p, value in curve.items()})
        for block, curve in upper.items()
        if block not in unexercised
    }
    sizes = stored_sizes(model, names=curves)
    plans = draw_precisions(model, sizes, curves, count=PLANS, seed=seed)
    plan_kl = [quality.kl_nats for quality in measure(model, batches, plans)]
    return CalibratedModel(
        predictions=predictions,
        calibrations=calibrations,
        final=final,
        curves=curves,
        unexercised=unexercised,
        pairs=pairs,
        measured=list(measured.values()),
        plans=plans,
        plan_ratios=[
            value / predicted_kl(curves, plan) for value, plan in zip(plan_kl, plans, strict=True)
        ],
    )


def _measure_probes(
    model: Any, batches: Sequence[Tensor], pairs: Sequence[Pair], *, count: int
) -> tuple[dict[Pair, Quality], list[Pair], bool]:
    """Measure pairs in their order until ``count`` changed something; return these, those that
    changed nothing, and whether the pairs came to an end.
    """
    found: dict[Pair, Quality] = {}
    unchanged: list[Pair] = []
    rest = list(pairs)
    while rest and len(found) < count:
        missing = count - len(found)
        drawn, rest = rest[:missing], rest[missing:]
        qualities = measure(model, batches, [{block: precision} for block, precision in drawn])
        for pair, quality in zip(drawn, qualities, strict=True):
            if quality.kl_nats > 0:
                found[pair] = quality
            else:
                unchanged.append(pair)
    return found, unchanged, not rest


def calibrated_hints(
    hints: Hints, found: CalibratedModel, *, kernels: Mapping[str, Any], text: Mapping[str, Any]
) -> Hints:
    """Return the hints with every block's curve and what is known of their accuracy."""
    final = found.final
    quality = {
        **hints.quality,
        "calibrated": True,
        "signal": "larger of fisher_true and directional",
        "scale": {signal: value.scale for signal, value in found.calibrations.items()},
        "band": list(final.band),
        "conformal_factor": found.factor,
        "trustworthy": found.factor <= LARGEST_TRUSTED_FACTOR,
        "pair_factor": final.conformal_factor,
        "plan_factor": found.plan_factor,
        "coverage": COVERAGE,
        "confidence": CONFIDENCE,
        "fit_probes": final.fit_probes,
        "conformal_probes": final.conformal_probes,
        "exhaustive": final.exhaustive,
        "plans": len(found.plans),
        "unexercised": list(found.unexercised),
        "kernels": dict(kernels),
        "text": dict(text),
    }
    blocks = {
        name: replace(hint, kl=found.curves.get(name, {})) for name, hint in hints.blocks.items()
    }
    return replace(hints, blocks=blocks, quality=quality)
