"""Predicted KL of a model's blocks by every signal that can be had, and pairs to check it on."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.optimizer import OPTIMIZER_FILE
from ..hints import Hints
from ..precision.errors import WeightErrors
from ..precision.perturb import curve_precisions, lossy_blocks
from ..precision.remember import Remember, call
from ..precision.sensitivity import (
    Curves,
    GradientCurves,
    diagonal_curves,
    gradient_curves,
    magnitude_curves,
    random_curves,
)
from ..precision.tolerance import MIN_PROBES, Calibration, calibrate
from ..signals import FisherLabels
from ..signals.moments import read_moments
from ..vocabulary import Precision

Pair = tuple[str, Precision]
"""A block and a precision that changes it."""

NATS = ("adam", "fisher_empirical", "fisher_true", "directional")
"""Signals that predict nats; the controls, magnitude and random, only rank."""
UPPER = ("fisher_true", "directional")
"""Those whose larger one is a block's curve."""
_LOGITS_AT_ONCE = 1 << 26
"""Values of one batch's logits: 256 MiB in float32, held three times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    """Curves by signal name. ``missing``: signal -> why it can't be had here."""

    curves: Mapping[str, Curves]
    missing: Mapping[str, str]
    true: GradientCurves

    def reaches(self, pair: Pair) -> bool:
        """Say whether the text's gradients see a pair: no token was routed to some experts."""
        block, precision = pair
        return any(self.curves[signal][block][precision] > 0 for signal in UPPER)


def predict(
    model: torch.nn.Module,
    tokens: Tensor,
    *,
    folder: str,
    hints: Hints,
    draws: int,
    seed: int,
    empirical: bool,
    errors: WeightErrors | None = None,
    remember: Remember = call,
    progress: Callable[[int], object] | None = None,
) -> Predictions:
    """Predict from the moments that ``folder`` keeps and from gradients on ``tokens`` (N, T).

    The text is gone through until ``draws`` single sequences gave a gradient with labels sampled
    anew. ``empirical``: one more pass, with the text's own labels. ``errors`` of the model, and
    ``remember``, as ``gradient_curves`` takes them.
    """
    errors = errors or WeightErrors(model)
    rows = torch.arange(draws) % len(tokens)
    take = partial(
        gradient_curves, model, seed=seed, errors=errors, remember=remember, progress=progress
    )
    true = take(torch.split(tokens[rows], 1), labels=FisherLabels.SAMPLED)
    curves: dict[str, Curves] = {}
    missing: dict[str, str] = {}
    adam = _adam_curves(model, Path(folder), hints, errors)
    if isinstance(adam, str):
        missing["adam"] = adam
    else:
        curves["adam"] = adam
    if empirical:
        data = take(torch.split(tokens, 1), labels=FisherLabels.DATA)
        curves["fisher_empirical"] = data.diagonal
    curves["fisher_true"] = true.diagonal
    curves["directional"] = true.directional
    curves["magnitude"] = magnitude_curves(model, errors=errors)
    curves["random"] = random_curves(model, seed=seed)
    return Predictions(curves=curves, missing=missing, true=true)


def list_pairs(model: torch.nn.Module, *, seed: int, magnitude: Curves | None = None) -> list[Pair]:
    """Return every block and precision that changes its weights, in random order.

    A precision that holds them exactly changes nothing: bf16 of weights that were trained in it.
    ``magnitude``: the curves of that name, where they are known.
    """
    errors = magnitude_curves(model) if magnitude is None else magnitude
    pairs = [
        (block.name, precision)
        for precision in curve_precisions(model)
        for block in lossy_blocks(model, precision)
        if errors[block.name][precision] > 0
    ]
    random.Random(seed).shuffle(pairs)
    return pairs


def calibrate_signals(
    predictions: Predictions, pairs: Sequence[Pair], measured: Sequence[float], *, all_pairs: bool
) -> dict[str, Calibration]:
    """Calibrate each signal that predicts nats on measured pairs in random order.

    ``all_pairs``: they are all that there are. One that knows too few of them (Adam's moment where
    most weights are frozen) is left out.
    """
    calibrations = {}
    for signal in NATS:
        if signal in predictions.curves:
            curves = predictions.curves[signal]
            known = [
                (curves[block][precision], kl)
                for (block, precision), kl in zip(pairs, measured, strict=True)
                if block in curves and curves[block][precision] > 0
            ]
            if len(known) >= MIN_PROBES:
                calibrations[signal] = calibrate(*zip(*known, strict=True), all_pairs=all_pairs)
    return calibrations


def upper_curves(predictions: Predictions, calibrations: Mapping[str, Calibration]) -> Curves:
    """Return the larger of diagonal and directional prediction, each on its scale.

    The diagonal is blind to correlated errors and has little noise; the directional estimate is the
    opposite.
    """
    scaled = [(predictions.curves[signal], calibrations[signal].scale) for signal in UPPER]
    return {
        block: {
            precision: max(curves[block][precision] * scale for curves, scale in scaled)
            for precision in curve
        }
        for block, curve in predictions.curves["fisher_true"].items()
    }


def measuring_batches(tokens: Tensor, vocab_size: int) -> tuple[Tensor, ...]:
    """Cut sequences into batches whose logits are of a bearable size."""
    return torch.split(tokens, sequences_at_once(tokens, vocab_size))


def sequences_at_once(tokens: Tensor, vocab_size: int) -> int:
    """Return how many sequences of such a length have logits of a bearable size."""
    return max(1, _LOGITS_AT_ONCE // (tokens.shape[1] * vocab_size))


def _adam_curves(
    model: torch.nn.Module, folder: Path, hints: Hints, errors: WeightErrors
) -> Curves | str:
    """Return the curves by Adam's moment, in nats where its scale is known; or why there are none.

    An unknown scale is taken for 1: calibration fits it.
    """
    if not (folder / OPTIMIZER_FILE).is_file():
        return f"{folder} has no {OPTIMIZER_FILE}"
    provenance: Mapping[str, Any] = hints.provenance
    beta2 = provenance.get("beta2")
    if provenance.get("signal") != "adam_exp_avg_sq" or not isinstance(beta2, float):
        return "the hints don't say the moment's beta2"
    tokens, clip_sq = provenance.get("tokens_per_update"), provenance.get("mean_clip_sq")
    scale = tokens / clip_sq if tokens and clip_sq else 1.0
    return diagonal_curves(model, read_moments(folder, beta2=beta2), scale=scale, errors=errors)
