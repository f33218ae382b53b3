"""From predicted to true KL: one scale per signal, an error band, and the veto's safety factor.

A second-order prediction ranks better than it scales (a moment far from convergence, large errors
at few bits), so a few *probes*, random pairs of block and precision whose true KL is measured, fix
it:

    scale   exp(median log(measured / predicted)) over the fitting probes
    band    10th and 90th percentile of measured / (scale predicted) over the others
    factor  the k-th smallest of these n ratios, k = ceil((n + 1) coverage): split conformal (Vovk
            et al. 2005; Lei et al. 2018, arXiv 1604.04173). The next exchangeable pair's true KL is
            then at most factor * scale * predicted with probability >= coverage, whatever the
            distribution.

The scale is fitted on other probes than the factor, so that the guarantee holds. Ratios have no
meaning where nothing changes: pairs with a predicted KL of 0 are left out by the caller.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError

COVERAGE = 0.95
PROBES = 80
"""Enough that 60 are left for the factor: with 59 or more their largest ratio covers 95 % of pairs
in 95 % of cases (0.95^59 < 0.05)."""
MIN_PROBES = 8
_FIT_SHARE = 0.25
_BAND = (0.1, 0.9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What turns a signal's prediction into nats, and how far to trust it."""

    scale: float
    band: tuple[float, float]
    conformal_factor: float
    coverage: float
    """Of ``conformal_factor``: 0.95, or n / (n + 1) where there are fewer than 19 ratios."""
    fit_probes: int
    conformal_probes: int

    def to_json(self) -> dict[str, Any]:
        """Return all fields as a document."""
        return {**asdict(self), "band": list(self.band)}


def calibrate(predicted: Sequence[float], measured: Sequence[float]) -> Calibration:
    """Fit scale, band and factor on probes in random order, all with a KL above 0.

    The first quarter fits the scale. Raises InputError for fewer than ``MIN_PROBES``.
    """
    if len(predicted) < MIN_PROBES:
        raise InputError(
            f"{len(predicted)} probes are too few to calibrate with: {MIN_PROBES} at least"
        )
    if min(predicted) <= 0 or min(measured) <= 0:
        raise InputError("a probe's KL is 0: only pairs that change weights can calibrate")
    ratios = np.asarray(measured) / np.asarray(predicted)
    num_fit = math.ceil(_FIT_SHARE * len(ratios))
    scale = float(np.exp(np.median(np.log(ratios[:num_fit]))))
    rest = np.sort(ratios[num_fit:]) / scale
    index = math.ceil((len(rest) + 1) * COVERAGE)
    low, high = np.quantile(rest, _BAND)
    return Calibration(
        scale=scale,
        band=(float(low), float(high)),
        conformal_factor=float(rest[min(index, len(rest)) - 1]),
        coverage=COVERAGE if index <= len(rest) else len(rest) / (len(rest) + 1),
        fit_probes=num_fit,
        conformal_probes=len(rest),
    )


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
