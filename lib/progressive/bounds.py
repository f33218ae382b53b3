"""What quality a request declares, and what its answer is then known to have."""

import math
from dataclasses import dataclass
from enum import StrEnum

from ..errors import InputError


class RequestError(InputError):
    """A request that can't be served as it is: ``param`` names the field, ``code`` the reason."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class Metric(StrEnum):
    """In what an answer may differ from the full model's."""

    KL = "kl"
    """Mean over the answer's tokens of KL(full || answered with), nats per token."""
    EXACT = "exact"
    """Not at all: the tokens are those that the full model chooses."""


class Kind(StrEnum):
    """How a bound is known."""

    NONE = "none"
    """Nothing is known: the tier was given, and isn't the full one."""
    FULL = "full"
    """Computed with the full state: there is no error."""
    VERIFIED = "verified"
    """Measured by a pass over the full state, token by token (delta = 0)."""
    CALIBRATED = "calibrated"
    """A tolerance limit of like requests: exceeded with a chance of at most delta."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityBound:
    """What a request declares. Raises RequestError for what can't be a bound."""

    epsilon: float = 0.0
    """The most that ``metric`` may be; 0 for ``exact``."""
    metric: Metric = Metric.KL
    delta: float = 0.0
    """The chance with which it may be exceeded; 0: never, so the answer is verified."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.epsilon) or self.epsilon < 0:
            raise RequestError(
                f"quality_bound.epsilon is {self.epsilon}: give a finite number of nats per token, "
                "0 or more",
                param="quality_bound",
            )
        if not 0 <= self.delta < 1:
            raise RequestError(
                f"quality_bound.delta is {self.delta}: give a chance from 0 (verified) to below 1",
                param="quality_bound",
            )
        if self.metric is Metric.EXACT and (self.epsilon or self.delta):
            raise RequestError(
                "quality_bound of metric exact has neither epsilon nor delta: leave them out",
                param="quality_bound",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """What an answer is known to have."""

    tier: str
    """Name of the ladder's tier that the answer ended at."""
    bound: float
    """Upper bound of the metric: measured where verified."""
    metric: Metric
    kind: Kind
    delta: float
    escalations: int
    """Tiers that were climbed."""
    kv_bytes: int
    """The most that its keys and values took of fast memory."""
    total_bytes: int
    """With the originals, below: the most at one time."""


def kind_of(bound: QualityBound | None) -> Kind:
    """Say how a declared bound is kept."""
    if bound is None:
        return Kind.FULL
    return Kind.CALIBRATED if bound.delta else Kind.VERIFIED


def quality_of(
    bound: QualityBound | None,
    tier: str,
    *,
    value: float = 0.0,
    kind: Kind | None = None,
    escalations: int = 0,
    kv_bytes: int = 0,
    total_bytes: int = 0,
) -> Quality:
    """Return what is known of an answer under a declared bound."""
    return Quality(
        tier=tier,
        bound=value,
        metric=bound.metric if bound else Metric.KL,
        kind=kind or kind_of(bound),
        delta=bound.delta if bound else 0.0,
        escalations=escalations,
        kv_bytes=kv_bytes,
        total_bytes=total_bytes,
    )
