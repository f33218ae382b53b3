"""Curves of a model, predicted and calibrated, and the hints that they make."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from lib.hints import Hints
from lib.precision.calibration import (
    CONFIDENCE,
    COVERAGE,
    PROBES,
    Calibration,
    calibrate,
    tolerance_limit,
)
from lib.precision.plans import draw_plans, predicted_kl
from lib.precision.quality import Quality
from lib.precision.sensitivity import Curves, monotone
from lib.precision.sizes import Plan, stored_sizes
from scripts.oracle import measure, progress_bar
from scripts.predictions import (
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
    """Of each signal by itself."""
    final: Calibration
    """Of ``curves``."""
    curves: Curves
    """In nats: the larger of diagonal and directional estimate, on scale, never falling."""
    pairs: Sequence[Pair]
    """Those measured, in random order."""
    num_pairs: int
    """Of the model."""
    measured: Sequence[Quality]
    plans: Sequence[Plan]
    plan_ratios: Sequence[float]
    """Measured over predicted KL of each plan."""

    @property
    def plan_factor(self) -> float:
        """What covers 95 % of plans that an allocation chooses, with 95 % confidence."""
        return tolerance_limit(self.plan_ratios)


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
    num_pairs = len(pairs)
    pairs = pairs if oracle else pairs[:PROBES]
    all_pairs = len(pairs) == num_pairs
    batches = measuring_batches(calibration_text, vocab_size)
    measured = measure(model, batches, [{block: precision} for block, precision in pairs])
    kl = [quality.kl_nats for quality in measured]
    calibrations = calibrate_signals(predictions, pairs, kl, all_pairs=all_pairs)
    upper = upper_curves(predictions, calibrations)
    final = calibrate([upper[block][p] for block, p in pairs], kl, all_pairs=all_pairs)
    curves = {
        block: monotone({p: value * final.scale for p, value in curve.items()})
        for block, curve in upper.items()
    }
    plans = draw_plans(model, stored_sizes(model), curves, count=PLANS, seed=seed)
    plan_kl = [quality.kl_nats for quality in measure(model, batches, plans)]
    return CalibratedModel(
        predictions=predictions,
        calibrations=calibrations,
        final=final,
        curves=curves,
        pairs=pairs,
        num_pairs=num_pairs,
        measured=measured,
        plans=plans,
        plan_ratios=[
            value / predicted_kl(curves, plan) for value, plan in zip(plan_kl, plans, strict=True)
        ],
    )


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
        "conformal_factor": max(final.conformal_factor, found.plan_factor),
        "pair_factor": final.conformal_factor,
        "plan_factor": found.plan_factor,
        "coverage": COVERAGE,
        "confidence": CONFIDENCE,
        "fit_probes": final.fit_probes,
        "conformal_probes": final.conformal_probes,
        "exhaustive": final.exhaustive,
        "plans": len(found.plans),
        "kernels": dict(kernels),
        "text": dict(text),
    }
    blocks = {name: replace(hint, kl=found.curves[name]) for name, hint in hints.blocks.items()}
    return replace(hints, blocks=blocks, quality=quality)
