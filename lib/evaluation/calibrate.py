"""Curves of a model, predicted and calibrated, and the hints that they make."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from ..hints import Hints
from ..precision.errors import WeightErrors
from ..precision.plans import draw_precisions, predicted_kl
from ..precision.quality import bootstrap_interval
from ..precision.racing import REFERENCES, RISK, Race
from ..precision.remember import Remember, call
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
    split_probes,
    tolerance_limit,
)
from ..progress import progress_bar
from ..tiering.stores.limits import available_memory
from .predictions import (
    Pair,
    Predictions,
    calibrate_signals,
    list_pairs,
    predict,
    upper_curves,
)
from .probing import Probing

PLANS = 63
"""As many as a race takes for its factor (``tolerance.PROBES`` says why)."""
DRAWS = 64
"""Gradients with sampled labels: the directional estimate's standard error is 18 %, which the
factor makes up for."""
LENGTH = 256
"""Tokens per sequence: what precision costs hardly changes behind the first 64 (measured:
docs/precision.md), and more sequences say more than longer ones."""
_FIRST_PLANS = 2
"""Sequences that every plan is measured on. Plans differ less from sequence to sequence than pairs:
errors of single blocks average out in them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What was measured of a pair or a plan. In nats per token, over the whole calibration text."""

    kl_nats: float
    kl_limit: float
    """What the factor counts: the mean itself of what was measured on every sequence."""
    kl_interval: tuple[float, float] | None
    """95 % interval of what was measured on every sequence."""
    sequences: int
    """Those that it was measured on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibratedModel:
    """Everything that calibration predicted and measured."""

    predictions: Predictions
    calibrations: Mapping[str, Calibration]
    """The calibration of each signal by itself, by the estimates of what probes cost."""
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
    measured: Sequence[Probe]
    """Each with a KL above 0."""
    plans: Sequence[PrecisionMap]
    plan_ratios: Sequence[float]
    """What the factor counts of each plan over what is predicted for it."""
    plan_sequences: Sequence[int]
    """Those that each plan was measured on."""
    sequences: int
    """Of the calibration text."""
    raced: bool
    """Whether probes and plans were measured on as many sequences as it took to tell the largest
    ratio, rather than each on all."""

    @property
    def plan_factor(self) -> float:
        """The factor that covers 95 % of plans that an allocation chooses, with 95 % confidence."""
        return max(self.plan_ratios) if self.raced else tolerance_limit(self.plan_ratios)

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
    every_sequence: bool = False,
    remember: Remember = call,
) -> CalibratedModel:
    """Predict on one text, measure on another (both (N, T)), and fit. The model is in float32.

    Probes and plans race (``precision.racing``): each is measured on a few sequences, and those
    whose ratio to the prediction may be the largest on all. ``every_sequence``: all of them on all,
    the slow way to the same factor. ``oracle``: that, of every pair, and predict from the text's
    own labels as well. ``remember`` keeps each step, so that what was interrupted goes on.
    """
    every_sequence |= oracle
    errors = WeightErrors(model, keep_bytes=_memory_for_errors(model))
    with progress_bar(draws + (len(fisher_text) if oracle else 0), "gradients") as bar:
        predictions = predict(
            model,
            fisher_text,
            folder=folder,
            hints=hints,
            draws=draws,
            seed=seed,
            empirical=oracle,
            errors=errors,
            remember=remember,
            progress=bar.update,
        )
    del errors
    pairs = list_pairs(model, seed=seed, magnitude=predictions.curves["magnitude"])
    blocks = {block for block, _ in pairs}
    pairs = [pair for pair in pairs if predictions.reaches(pair)]
    probing = Probing(model, calibration_text, vocab_size=vocab_size, seed=seed, remember=remember)
    probes = _Probes(probing, pairs, count=len(pairs) if oracle else PROBES)
    unexercised = sorted(blocks - {block for block, _ in probes.pairs} - probes.untried)
    calibrations, final = probes.fit(predictions)
    if every_sequence:
        probes.race.finish(probes.found)
    else:
        probes.run(predictions, calibrations, final)
    calibrations, final = probes.fit(predictions, raced=not every_sequence)
    curves = {
        block: monotone({p: in_nats(value, final.scale) for p, value in curve.items()})
        for block, curve in upper_curves(predictions, calibrations).items()
        if block not in unexercised
    }
    plans = draw_precisions(
        model, stored_sizes(model, names=curves), curves, count=PLANS, seed=seed
    )
    race = Race(
        probing.measure("plan", plans), count=len(plans), total=probing.total, first=_FIRST_PLANS
    )
    everyone = range(len(plans))
    race.begin(everyone)
    if every_sequence:
        race.finish(everyone)
    predicted = [predicted_kl(curves, plan) for plan in plans]
    ratios = race.run(everyone, predicted, references=everyone[:REFERENCES]).limits
    return CalibratedModel(
        predictions=predictions,
        calibrations=calibrations,
        final=final,
        curves=curves,
        unexercised=unexercised,
        pairs=probes.pairs,
        measured=probes.measured(),
        plans=plans,
        plan_ratios=ratios.tolist(),
        plan_sequences=[len(kl) for kl in race.kl],
        sequences=probing.total,
        raced=not every_sequence,
    )


class _Probes:
    """Pairs in random order, ``count`` of which change something on the text, and their race."""

    def __init__(self, probing: Probing, pairs: Sequence[Pair], *, count: int) -> None:
        self._all = list(pairs)
        choices = [{block: precision} for block, precision in pairs]
        measure = probing.measure("pair", choices)
        self.race = Race(measure, count=len(pairs), total=probing.total)
        self.found: list[int] = []
        """Those that change something."""
        self._limits: dict[int, float] = {}
        drawn = 0
        while drawn < len(pairs) and len(self.found) < count:
            new = range(drawn, min(drawn + count - len(self.found), len(pairs)))
            self.race.begin(new)
            self.found += [index for index in new if sum(self.race.kl[index]) > 0]
            drawn = new.stop
        self.pairs = [pairs[index] for index in self.found]
        self._all_pairs = drawn == len(pairs)
        self.untried = {block for block, _ in pairs} - {block for block, _ in pairs[:drawn]}
        """Blocks that no probe tells anything of."""

    @property
    def contenders(self) -> list[int]:
        """Those that the factor is made from."""
        return self.found[split_probes(len(self.found), all_pairs=self._all_pairs)[1] :]

    def fit(
        self, predictions: Predictions, *, raced: bool = False
    ) -> tuple[dict[str, Calibration], Calibration]:
        """Return the calibration of each signal and of the curve, by what is measured so far."""
        means = self.race.means()
        kl = [means[index] for index in self.found]
        calibrations = calibrate_signals(predictions, self.pairs, kl, all_pairs=self._all_pairs)
        upper = upper_curves(predictions, calibrations)
        limits = [self._limits.get(index, means[index]) for index in self.found]
        final = calibrate(
            [upper[block][p] for block, p in self.pairs],
            kl,
            limits=limits if raced else None,
            all_pairs=self._all_pairs,
        )
        return calibrations, final

    def run(
        self,
        predictions: Predictions,
        calibrations: Mapping[str, Calibration],
        final: Calibration,
    ) -> None:
        """Race the contenders, by their ratio to the predicted curve."""
        upper = upper_curves(predictions, calibrations)
        predicted = [
            in_nats(upper[block][p], final.scale)
            for block, p in (self._all[index] for index in self.contenders)
        ]
        references = self.found[:REFERENCES]  # of the fitting probes
        standing = self.race.run(self.contenders, predicted, references=references)
        limits = (standing.limits * predicted).tolist()
        self._limits = dict(zip(self.contenders, limits, strict=True))

    def measured(self) -> list[Probe]:
        """Return what is known of each pair."""
        means, found = self.race.means(), []
        for index in self.found:
            kl = self.race.kl[index]
            found.append(
                Probe(
                    kl_nats=means[index],
                    kl_limit=self._limits.get(index, means[index]),
                    kl_interval=bootstrap_interval(kl) if len(kl) == self.race.total else None,
                    sequences=len(kl),
                )
            )
        return found


def _memory_for_errors(model: Any) -> int:
    """Return the bytes that errors of weights may take: a quarter of what is left."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) // 4
    return available_memory() // 4


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
        "race": _race_json(found) if found.raced else None,
        "unexercised": list(found.unexercised),
        "kernels": dict(kernels),
        "text": dict(text),
    }
    blocks = {
        name: replace(hint, kl=found.curves.get(name, {})) for name, hint in hints.blocks.items()
    }
    return replace(hints, blocks=blocks, quality=quality)


def _race_json(found: CalibratedModel) -> dict[str, Any]:
    """Return how far probes and plans were measured."""
    return {
        "risk": RISK,
        "sequences": found.sequences,
        "pairs_on_all": sum(probe.sequences == found.sequences for probe in found.measured),
        "plans_on_all": sum(count == found.sequences for count in found.plan_sequences),
        "mean_sequences_per_pair": mean(probe.sequences for probe in found.measured),
        "mean_sequences_per_plan": mean(found.plan_sequences),
    }
