"""A system under a limit, round after round, and the entry of the document that it becomes."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from lib.units import MIB
from scripts.cgroups import LimitedRun

from .figures import Fields, summarize_failure, summarize_run
from .systems import RESIDENT, System


@dataclass(kw_only=True)
class Case:
    """What is run, and what its rounds gave; ``reason`` says why it is not run (again)."""

    system: System
    limit_mib: int | None
    results: list[Fields] = field(default_factory=list)
    matches: list[Fields] = field(default_factory=list)
    limited: list[LimitedRun] = field(default_factory=list)
    cached_bytes: int = 0
    reason: str | None = None

    @property
    def name(self) -> str:
        """Name it for people."""
        limit = "no limit" if self.limit_mib is None else f"{self.limit_mib} MiB"
        return f"{self.system.name}, {limit}"


def summarize_cases(cases: Sequence[Case]) -> list[Fields]:
    """Return the runs of the document. What a token takes to compute is the resident model's."""
    resident_seconds = [
        interval["seconds"]
        for case in cases
        if case.system is RESIDENT
        for result in case.results
        for interval in result["intervals"]
        if interval["timed"]
    ]
    compute = statistics.median(resident_seconds) if resident_seconds else None
    return [_summarize_case(case, compute) for case in cases]


def _summarize_case(case: Case, compute_seconds: float | None) -> Fields:
    survived = case.reason is None and bool(case.results)
    if not case.system.full_precision:
        compute_seconds = None  # compressed weights are computed with at a speed of their own
    figures = (
        summarize_run(case.results, compute_seconds=compute_seconds)
        if survived
        else summarize_failure()
    )
    match = min(case.matches, key=lambda match: match["tokens_equal"], default=None)
    if match is not None:
        match = {**match, "bit_equal": all(match["bit_equal"] for match in case.matches)}
    facts = case.results[-1] if survived else {}
    return {
        "name": case.system.name,
        "label": case.system.label,
        "peer": case.system.peer,
        "limit_mib": case.limit_mib,
        "survived": survived,
        "reason": case.reason,
        **figures,
        "peak_mib": _peak_mib([run.peak_bytes for run in case.limited]),
        "peak_anon_mib": _peak_mib([run.peak_anon_bytes for run in case.limited]),
        "cached_before_mib": case.cached_bytes / MIB,
        "match": match,
        "budget_bytes": facts.get("budget_bytes"),
        "anonymous_bytes": facts.get("anonymous_bytes"),
        "plan": facts.get("plan"),
    }


def _peak_mib(peaks: Sequence[int]) -> float | None:
    return max(peaks) / MIB if peaks else None
