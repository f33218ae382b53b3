"""Bounds of a calibration in an engine: what a tier's is, and which answers are audited."""

import math
import threading

from .active import Active
from .audit import RequestAudit
from .bounds import RequestError
from .calibration import Calibration
from .estimators import Calibrated, Evidence, choose_estimator
from .generation import GenerationRequest
from .measuring import Measurement, OnMeasured

AUDITED_SHARE = 0.05
"""Of requests under a calibrated bound."""
DELTAS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
"""Those that bounds are given for: others are taken for the next smaller one, so that each has an
audit that requests add up in.
"""


class CalibratedBounds:
    """The bounds of one calibration, or of none; each of ``DELTAS`` has an audit of its own, and
    one that has stopped stops those of smaller deltas as well.

    ``full``: index of the full tier. Bounds are asked for in the engine's thread; requests are
    checked, and audits told, in any.
    """

    def __init__(
        self, calibration: Calibration | None, full: int, *, audited_share: float = AUDITED_SHARE
    ) -> None:
        self._calibration, self._full, self._share = calibration, full, audited_share
        self._lock = threading.Lock()
        self._audits: dict[float, RequestAudit] = {}

    def check(self, request: GenerationRequest) -> None:
        """Raise RequestError for a bound that this calibration can't keep, and for answers other
        than it was made from.
        """
        bound, sampling = request.bound, request.sampling
        choose_estimator(bound, self._full, calibration=self._calibration)
        if bound is not None and bound.delta:
            assert self._calibration is not None
            self._calibration.factor(_taken_for(bound.delta))
        if bound is not None and bound.delta and (sampling.temperature or sampling.constraint):
            how = f"temperature {sampling.temperature}" if sampling.temperature else "a grammar"
            raise RequestError(
                f"quality_bound.delta is {bound.delta}, which is calibrated on greedy answers, and "
                f"this one has {how}: leave delta out (the answer is then verified)",
                param="quality_bound",
                code="calibration_of_greedy",
            )

    def bound(self, active: Active) -> float:
        """Return the bound of an answer at the tier that it has, nats per token; infinite where
        nothing is known.
        """
        if active.tier == self._full:
            return 0.0
        declared = active.request.bound
        assert declared is not None and self._calibration is not None
        delta = _taken_for(declared.delta)
        if self._is_stopped(delta):
            return math.inf
        estimator = Calibrated(self._calibration, delta, self._audit(delta))
        evidence = Evidence(prompt_tokens=len(active.request.prompt), errors=active.prompt_errors)
        found = estimator.bound(evidence, active.tier)
        return math.inf if found is None else found.value

    def draw(self, number: int, request: GenerationRequest) -> OnMeasured | None:
        """Return what is to be told how far an answer was off; None: it isn't audited."""
        declared = request.bound
        assert declared is not None
        audit = self._audit(_taken_for(declared.delta))
        if not audit.is_chosen(number):
            return None

        def tell(found: Measurement | Exception) -> None:
            if isinstance(found, Measurement):  # else it wasn't measured, and says nothing
                with self._lock:
                    audit.record(broken=found.tier < self._full and found.mean > declared.epsilon)

        return tell

    def counts(self) -> tuple[int, int, int]:
        """Return how many answers were audited, how many were above their bounds, and of how many
        deltas nothing is released below full any more.
        """
        with self._lock:
            audits = list(self._audits.values())
        return (
            sum(each.num_audits for each in audits),
            sum(each.num_broken for each in audits),
            sum(each.stopped for each in audits),
        )

    def _is_stopped(self, delta: float) -> bool:
        with self._lock:
            return any(each.stopped for of, each in self._audits.items() if of >= delta)

    def _audit(self, delta: float) -> RequestAudit:
        with self._lock:
            if delta not in self._audits:
                self._audits[delta] = RequestAudit(delta, share=self._share)
            return self._audits[delta]


def _taken_for(delta: float) -> float:
    """Return the largest of ``DELTAS`` that is not above one; RequestError below all."""
    allowed = [each for each in DELTAS if each <= delta]
    if not allowed:
        raise RequestError(
            f"quality_bound.delta is {delta}: give {DELTAS[0]} or more, or leave it out "
            "(the answer is then verified)",
            param="quality_bound",
        )
    return allowed[-1]
