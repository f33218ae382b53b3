"""Bounds of a calibration in an engine: what a tier's is, and which answers are audited."""

import math
import secrets
import threading
import warnings
from collections.abc import Mapping
from dataclasses import replace

from ..errors import InputError
from .active import Active
from .audit import AuditCounts, RequestAudit
from .audit_file import AuditFile
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

    ``full``: index of the full tier. ``audit_file``: what audits have found so far, and where it is
    kept; None: with this object. Bounds are asked for in the engine's thread; requests are checked,
    and audits told, in any.
    """

    def __init__(
        self,
        calibration: Calibration | None,
        full: int,
        *,
        audited_share: float = AUDITED_SHARE,
        audit_file: AuditFile | None = None,
    ) -> None:
        self._calibration, self._full, self._share = calibration, full, audited_share
        self._file = audit_file
        self._seed = secrets.randbits(63)  # else each restart would draw the same few again
        self._lock = threading.RLock()
        self._audits: dict[float, RequestAudit] = {}
        self._failed = 0
        if audit_file is not None:
            self._take(audit_file.found)

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
            with self._lock:
                if isinstance(found, Exception):  # it wasn't measured, and says nothing
                    self._failed += 1
                    return
                broken = found.tier < self._full and found.mean > declared.epsilon
                audit.record(broken=broken)
                self._keep(audit.delta, broken)

        return tell

    def counts(self) -> dict[str, int]:
        """Return how many answers were audited, how many were above their bounds, how many could
        not be measured, and of how many deltas nothing is released below full any more.
        """
        with self._lock:
            counts = [each.counts for each in self._audits.values()]
            return {
                "audits": sum(each.audits for each in counts),
                "broken_bounds": sum(each.broken for each in counts),
                "failed_audits": self._failed,
                "stopped_bounds": sum(each.stopped for each in counts),
            }

    def _keep(self, delta: float, broken: bool) -> None:
        """Add an audit to the file, and take over what other servers have added."""
        if self._file is None:
            return
        try:
            self._file.add(delta, broken=broken)
        except (InputError, OSError) as error:
            warnings.warn(f"an audit isn't kept yet: {error}", RuntimeWarning, stacklevel=2)
            return
        self._take(self._file.found)

    def _take(self, found: Mapping[float, AuditCounts]) -> None:
        for delta, counts in found.items():
            audit = self._audit(delta)
            audit.counts = replace(counts, stopped=counts.stopped or audit.stopped)

    def _is_stopped(self, delta: float) -> bool:
        with self._lock:
            return any(each.stopped for of, each in self._audits.items() if of >= delta)

    def _audit(self, delta: float) -> RequestAudit:
        with self._lock:
            if delta not in self._audits:
                self._audits[delta] = RequestAudit(delta, share=self._share, seed=self._seed)
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
