"""Requests answered at every tier, and measured: the calibration that they give, and its trial on
requests that it hasn't seen. What is fitted and why it holds says ``progressive/estimators``.
"""

import math
import queue
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from ..errors import InputError
from ..precision.binomial import proportion_interval
from ..progressive.bounds import QualityBound
from ..progressive.calibration import Calibration, score_request
from ..progressive.estimators import (
    Evidence,
    LayerPair,
    choose_estimator,
    predict_damage,
)
from ..progressive.generation import GenerationRequest
from ..progressive.ladder import Ladder
from ..progressive.measuring import Measurement, OnMeasured


class Measures(Protocol):
    """An engine that answers a request at a tier and tells how far the answer was off."""

    def measure(
        self, request: GenerationRequest, on_measured: OnMeasured, *, tier: int | None = None
    ) -> None:
        """Begin; ``on_measured`` is called once, from any thread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRow:
    """One request at every tier below full, low to high."""

    prompt_tokens: int
    errors: tuple[tuple[LayerPair, ...], ...]
    """Of each tier, layer by layer: sums of squared errors of the prompt's pages."""
    measured: tuple[float, ...]
    """Of each tier: mean KL of the answer, nats per token."""

    def to_json(self) -> dict[str, Any]:
        """Return all fields as a document."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What a calibration's bounds did for requests that it hasn't seen."""

    requests: int
    broken: int
    """Answered below full, and further off than epsilon."""
    interval: tuple[float, float]
    """Of the chance to be broken, 95 % (Clopper-Pearson)."""
    tiers: tuple[int, ...]
    """Requests that were answered at each tier, full last."""

    def to_json(self) -> dict[str, Any]:
        """Return all fields as a document."""
        return asdict(self)


def measure_requests(
    engine: Measures,
    requests: Sequence[GenerationRequest],
    num_tiers: int,
    *,
    at_once: int = 16,
    progress: Callable[[int], object] | None = None,
) -> list[RequestRow]:
    """Answer each request at each of the ``num_tiers`` tiers below full.

    ``at_once``: answers that are asked for at a time. ``progress`` is called with how many answers
    are done. Raises what the engine raises for a request.
    """
    wanted = [(number, tier) for number in range(len(requests)) for tier in range(num_tiers)]
    told: queue.SimpleQueue[tuple[int, int, Measurement | Exception]] = queue.SimpleQueue()
    found: dict[tuple[int, int], Measurement] = {}

    def teller(number: int, tier: int) -> OnMeasured:
        return lambda result: told.put((number, tier, result))

    begun = 0
    while len(found) < len(wanted):
        while begun < len(wanted) and begun - len(found) < at_once:
            number, tier = wanted[begun]
            engine.measure(requests[number], teller(number, tier), tier=tier)
            begun += 1
        number, tier, result = told.get()
        if isinstance(result, Exception):
            raise result
        found[number, tier] = result
        if progress is not None:
            progress(1)
    rows = []
    for number in range(len(requests)):
        tiers = [found[number, tier] for tier in range(num_tiers)]
        rows.append(
            RequestRow(
                prompt_tokens=len(requests[number].prompt),
                errors=tuple(tuple(each.errors) for each in tiers),
                measured=tuple(each.mean for each in tiers),
            )
        )
    return rows


def make_calibration(
    rows: Sequence[RequestRow],
    *,
    keys: Mapping[str, str],
    ladder: Ladder,
    information: Sequence[LayerPair],
) -> Calibration:
    """Return the calibration that measured requests give.

    Raises InputError, naming the request, for one that says nothing: without a compact page in its
    prompt, or of another number of tiers.
    """
    scores = []
    for number, row in enumerate(rows):
        predicted = [predict_damage(information, each, row.prompt_tokens) for each in row.errors]
        try:
            if len(predicted) != ladder.full:
                raise InputError(f"{len(predicted)} tiers were measured, not {ladder.full}")
            scores.append(score_request(row.measured, predicted))
        except InputError as error:
            raise InputError(f"request {number} ({row.prompt_tokens} tokens): {error}") from error
    return Calibration(
        keys=dict(keys),
        ladder=ladder,
        information=tuple(information),
        scores=tuple(scores),
        tokens=tuple(row.prompt_tokens for row in rows),
    )


def try_calibration(
    calibration: Calibration, rows: Sequence[RequestRow], *, epsilon: float, delta: float
) -> Trial:
    """Answer unseen requests at the first tier whose bound is within epsilon, and count."""
    full = calibration.ladder.full
    asked = QualityBound(epsilon=epsilon, delta=delta)
    estimator = choose_estimator(asked, full, calibration=calibration)
    broken, tiers = 0, [0] * (full + 1)
    for row in rows:
        for tier in range(full + 1):
            errors = row.errors[tier] if tier < full else ()
            evidence = Evidence(prompt_tokens=row.prompt_tokens, errors=errors)
            bound = estimator.bound(evidence, tier)
            if bound is not None and bound.value <= epsilon:
                break
        tiers[tier] += 1
        broken += tier < full and row.measured[tier] > epsilon
    return Trial(
        requests=len(rows),
        broken=broken,
        interval=proportion_interval(broken, len(rows)),
        tiers=tuple(tiers),
    )


def expected_concurrency(compact_fraction: float, climbing: float) -> float:
    """Return how many times as many requests fit as in full, by 1/(c + (1 - c) p): of a share p
    all is full, of the others a fraction c of the bytes is held. No reserve is counted.
    """
    if not (0 < compact_fraction <= 1 and 0 <= climbing <= 1):
        raise InputError(
            f"a compact fraction of {compact_fraction} and a share of {climbing} that climb: give "
            "shares from 0 to 1"
        )
    return 1 / math.fsum((compact_fraction, (1 - compact_fraction) * climbing))
