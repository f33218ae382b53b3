"""How far an answer is from the full model's: bounds that say how they are known.

One protocol, ``bound(evidence, tier)``, and three ways:

*Full*: the full state was used, nothing differs.

*Verified*: a pass over the full state measured KL(full || answered with) of every released token;
the bound is their mean. Before that there is none.

*Calibrated*: before an answer is given, from the errors that a codec made in this request's own
keys and values, which are known when the prompt's pages are encoded:

    g(t) = 1/(2 T) sum over layers of F_keys e_keys(t) + F_values e_values(t)

with e the sums of squared errors at tier t, T the prompt's tokens and F the mean Fisher information
of a cached number (``signals/kv.py``; docs/kv_cache.md). Of n calibration requests, answered at
every tier below full, s = max over tiers of D(t)/g(t), where D is the measured mean KL. The bound
is c g(t), with c the order statistic of s that covers a share 1 - delta of requests with 95 %
confidence (59 requests for 5 %, the largest; 299 for 1 %). As s is a maximum over tiers, a request
that s <= c holds for is within its bound at each of them: the first tier whose bound is within
epsilon may be taken, for any epsilon, and any other rule may stop at any tier. A request of whose
prompt nothing is compact shows no error yet and has no bound below full.

What a bound doesn't cover is said beside it (``NOT_COVERED``). No torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ..errors import InputError
from .bounds import Kind, QualityBound, RequestError
from .calibration import Calibration
from .ladder import KvShape

if TYPE_CHECKING:
    from ..signals.kv import KvLayer
    from .audit import RequestAudit

NOT_COVERED = {
    Kind.NONE: "anything",
    Kind.FULL: "rounding: the same model in another batch or on another machine differs by it",
    Kind.VERIFIED: "rounding, as with full; and that a token is the one which the full model would "
    "have chosen: a mean KL doesn't tell, metric exact does",
    Kind.CALIBRATED: "requests unlike those of the calibration (other texts, lengths, settings, "
    "model, codec, ladder), and a share delta of those that are like them; the audit tells after "
    "some requests that a workload has changed, not at the first",
}
"""Of each kind of bound, what it says nothing about."""

LayerPair = tuple[float, float]
"""Of a layer's keys, and of its values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What is known of one request at one tier."""

    prompt_tokens: int
    errors: Sequence[LayerPair]
    """Sums of squared errors of the prompt's pages at this tier, layer by layer."""
    measured_nats: float = 0.0
    """Sum of the KL of the tokens that a pass over the full state has seen."""
    measured_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """At most ``value`` nats per token, known in the way of ``kind``; exceeded with a chance of at
    most ``delta``.
    """

    value: float
    kind: Kind
    delta: float = 0.0

    @property
    def not_covered(self) -> str:
        """What it says nothing about."""
        return NOT_COVERED[self.kind]


class Estimator(Protocol):
    """Bounds of one way of knowing. At the full tier every one says 0, of kind full."""

    def bound(self, evidence: Evidence, tier: int) -> Bound | None:
        """Return the bound of a request at a tier; None: nothing is known there."""


_NO_ERROR = Bound(value=0.0, kind=Kind.FULL)


class Full:
    """For requests without a bound of their own; ``full``: index of that tier."""

    def __init__(self, full: int) -> None:
        self._full = full

    def bound(self, evidence: Evidence, tier: int) -> Bound | None:
        """Return 0 at the full tier, and None below it."""
        return _NO_ERROR if tier == self._full else None


class Verified:
    """After windows were checked by passes over the full state."""

    def __init__(self, full: int) -> None:
        self._full = full

    def bound(self, evidence: Evidence, tier: int) -> Bound | None:
        """Return the mean of what was measured; None before anything was."""
        if tier == self._full:
            return _NO_ERROR
        if not evidence.measured_tokens:
            return None
        return Bound(value=evidence.measured_nats / evidence.measured_tokens, kind=Kind.VERIFIED)


class Calibrated:
    """By like requests. Raises RequestError for a delta that the calibration is too small for.

    ``audit``: where it has stopped, nothing is known below full.
    """

    def __init__(
        self, calibration: Calibration, delta: float, audit: "RequestAudit | None" = None
    ) -> None:
        self._calibration = calibration
        self._delta = delta
        self._factor = calibration.factor(delta)
        self._audit = audit

    def bound(self, evidence: Evidence, tier: int) -> Bound | None:
        """Return c g(t); None without any error to go by, or once the audit has stopped."""
        if tier == self._calibration.ladder.full:
            return _NO_ERROR
        if self._audit is not None and self._audit.stopped:
            return None
        predicted = predict_damage(
            self._calibration.information, evidence.errors, evidence.prompt_tokens
        )
        if not predicted:
            return None
        return Bound(value=self._factor * predicted, kind=Kind.CALIBRATED, delta=self._delta)


def choose_estimator(
    bound: QualityBound | None,
    full: int,
    *,
    calibration: Calibration | None = None,
    audit: "RequestAudit | None" = None,
) -> Estimator:
    """Return what a declared bound is known by; ``full``: index of the full tier.

    Raises RequestError for one that needs a calibration which isn't there, or has too few requests.
    """
    if bound is None:
        return Full(full)
    if not bound.delta:
        return Verified(full)
    if calibration is None:
        raise RequestError(
            f"quality_bound.delta is {bound.delta}, and there is no calibration for such bounds: "
            "leave delta out (the answer is then verified), or serve with a calibration file",
            param="quality_bound",
            code="calibration_missing",
        )
    return Calibrated(calibration, bound.delta, audit)


def predict_damage(
    information: Sequence[LayerPair], errors: Sequence[LayerPair], tokens: int
) -> float:
    """Return g, in nats per token: what squared errors cost by Fisher information, layer by layer.

    Raises InputError for other layers, and for errors that aren't finite.
    """
    if len(errors) != len(information):
        raise InputError(
            f"errors of {len(errors)} layers, and the calibration is of {len(information)}: it is "
            "another model's"
        )
    total = math.fsum(
        weight * error
        for weights, both in zip(information, errors, strict=True)
        for weight, error in zip(weights, both, strict=True)
    )
    if not math.isfinite(total) or total < 0:
        raise InputError(
            f"errors of keys and values add up to {total}: give finite sums of squares"
        )
    return total / (2 * tokens)


def mean_information(layers: "Sequence[KvLayer]", shape: KvShape) -> tuple[LayerPair, ...]:
    """Return the mean Fisher information of one cached number of each layer's keys and values."""
    return tuple(
        (
            layer.keys_trace / (shape.heads * shape.key_dim),
            layer.values_trace / (shape.heads * shape.value_dim),
        )
        for layer in layers
    )
