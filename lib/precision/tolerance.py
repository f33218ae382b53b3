"""From predicted to true KL: one scale per signal, an error band, and the veto's safety factor.

A second-order prediction ranks better than it scales (a moment far from convergence, large errors
at few bits), so a few *probes*, random pairs of block and precision whose true KL is measured, fix
it:

    scale   exp(median log(measured / predicted)) over the fitting probes
    band    10th and 90th percentile of measured / (scale predicted) over the others
    factor  the k-th smallest of these n ratios, the least k for which
            P(Binomial(n, coverage) <= k - 1) >= confidence

The factor is a distribution-free tolerance limit (Wilks 1941, Ann. Math. Statist. 12, 91-96), which
is what a split-conformal threshold needs for its coverage to hold given the probes that were drawn,
and not only on average over them (Vovk 2012, arXiv 1209.2673): with 95 % confidence at least 95 %
of all pairs have a true KL of at most factor * scale * predicted. The least n is 59 (0.95^59 <
0.05), with the largest ratio; from 93 on the second largest will do. The scale is fitted on other
probes than the factor, so that these are drawn like any other pair.

A model may have too few pairs for that. Then all of them are measured and nothing is left to
chance: the factor is the largest ratio of all, and covers every pair. Ratios have no meaning where
nothing changes: pairs whose KL is 0 are left out by the caller. Nor have they much where hardly
anything does: an expert that few tokens reach may be off by orders of magnitude and not matter. So
no prediction is taken for less than ``NEGLIGIBLE`` nats: a smaller KL is then covered whatever was
predicted, and N blocks add N times that, times the factor, to a bound.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from .binomial import covering_rank
from .racing import RISK

COVERAGE = 0.95
CONFIDENCE = 0.95
PROBES = 84
"""Three quarters of them, 63, are left for the factor: what a race takes (``racing``), whose risk
goes from the confidence. 1 - 0.95^63 - 0.01 is above 0.95."""
LEAST_PROBES = 59
"""For a factor with ``COVERAGE`` and ``CONFIDENCE``."""
MIN_PROBES = 8
NEGLIGIBLE = 1e-9
"""Nats per token, the least that a change of weights is said to cost: a thousand blocks of it are
less than what kernels cost."""
LARGEST_TRUSTED_FACTOR = 5.0
"""Above it predictions say little on this model: second order is off by 2 or 3 at 2 bits."""
_FIT_SHARE = 0.25
_BAND = (0.1, 0.9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What turns a signal's prediction into nats, and how far to trust it."""

    scale: float
    band: tuple[float, float]
    conformal_factor: float
    confidence: float
    """Confidence that ``conformal_factor`` covers 95 % of pairs, or every one where all were
    measured."""
    fit_probes: int
    conformal_probes: int
    exhaustive: bool
    """The probes are all pairs that there are: every one of them fits, and every one is covered."""

    def to_json(self) -> dict[str, Any]:
        """Return all fields as a document."""
        return {**asdict(self), "band": list(self.band)}


def split_probes(count: int, *, all_pairs: bool = False) -> tuple[int, int]:
    """Return how many probes, the first, fit the scale, and where those of the factor begin.

    ``all_pairs``: there are no others; if they are too few for a tolerance limit, every one counts
    for both.
    """
    num_fit = math.ceil(_FIT_SHARE * count)
    if all_pairs and count - num_fit < LEAST_PROBES:
        return count, 0
    return num_fit, num_fit


def calibrate(
    predicted: Sequence[float],
    measured: Sequence[float],
    *,
    limits: Sequence[float] | None = None,
    all_pairs: bool = False,
) -> Calibration:
    """Fit scale, band and factor on probes in random order, all with a KL above 0.

    The first quarter fits the scale (``split_probes``). ``limits``: of a race, upper limits of the
    KL, which make the factor; the largest ratio, since a race tells no other. Raises InputError for
    fewer than ``MIN_PROBES``.
    """
    if len(predicted) < MIN_PROBES:
        raise InputError(
            f"{len(predicted)} probes are too few to calibrate with: {MIN_PROBES} at least"
        )
    if min(predicted) <= 0 or min(measured) <= 0:
        raise InputError("a probe's KL is 0: only pairs that change weights can calibrate")
    true, raw = np.asarray(measured), np.asarray(predicted)
    num_fit, first = split_probes(len(true), all_pairs=all_pairs)
    exhaustive = first == 0
    scale = float(np.exp(np.median(np.log(true / raw)[:num_fit])))
    expected = np.maximum(raw * scale, NEGLIGIBLE)[first:]
    ratios = true[first:] / expected
    low, high = np.quantile(ratios, _BAND)
    risk = 0.0 if limits is None else RISK
    if limits is not None:
        ratios = np.asarray(limits)[first:] / expected
    factor = ratios.max() if exhaustive or limits is not None else tolerance_limit(ratios.tolist())
    chance = 0.0 if exhaustive else COVERAGE ** len(ratios)
    confidence = 1 - chance - risk
    return Calibration(
        scale=scale,
        band=(float(low), float(high)),
        conformal_factor=float(factor),
        confidence=confidence if exhaustive else min(CONFIDENCE, confidence),
        fit_probes=num_fit,
        conformal_probes=len(ratios),
        exhaustive=exhaustive,
    )


def in_nats(predicted: float, scale: float) -> float:
    """Return what a prediction says on its scale: 0, or no less than ``NEGLIGIBLE``."""
    return max(predicted * scale, NEGLIGIBLE) if predicted > 0 else 0.0


def tolerance_limit(ratios: Sequence[float]) -> float:
    """Return the order statistic that covers 95 % of what they were drawn from, with 95 %
    confidence; the largest one of fewer than 59, whose confidence is 1 - 0.95^n.
    """
    return sorted(ratios)[tolerance_rank(len(ratios)) - 1]


def tolerance_rank(count: int) -> int:
    """Return the least k with P(Binomial(count, 0.95) <= k - 1) >= 0.95; ``count`` if none has."""
    return covering_rank(count, COVERAGE, CONFIDENCE) or count


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Spearman's rank correlation, ties by their mean rank; 0 where one side is constant."""
    if len(first) != len(second) or len(first) < 2:
        raise InputError(f"{len(first)} and {len(second)} values: give two lists of one length")
    ranks = [_ranks(np.asarray(values, dtype=np.float64)) for values in (first, second)]
    centred = [values - values.mean() for values in ranks]
    norm = float(np.linalg.norm(centred[0]) * np.linalg.norm(centred[1]))
    return float(centred[0] @ centred[1]) / norm if norm else 0.0


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts).astype(np.float64)
    ranks: NDArray[np.float64] = (last - (counts - 1) / 2)[index]
    return ranks
