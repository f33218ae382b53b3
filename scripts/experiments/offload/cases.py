"""A system under a limit, round after round, and the entry of the document that it becomes."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from lib.units import MIB
from scripts.experiments.offload.cgroups import LimitedRun
from scripts.experiments.offload.figures import Fields, summarize_failure, summarize_run
from scripts.experiments.offload.peers import System

_NOT_EQUAL = {
    "bit_equal": "logits are not the resident model's bit for bit",
    "same_tokens": "tokens are not the resident model's",
}


@dataclass(kw_only=True)
class Case:
    """What is run, and what its rounds gave; ``reason`` says why it is not run (again), and
    ``impossible`` that this machine can't run, which isn't a failure.
    """

    system: System
    limit_mib: int | None
    results: list[Fields] = field(default_factory=list)
    matches: list[Fields] = field(default_factory=list)
    limited: list[LimitedRun] = field(default_factory=list)
    cached_bytes: int = 0
    reason: str | None = None
    impossible: bool = False

    @property
    def name(self) -> str:
        """Name it for people."""
        limit = "no limit" if self.limit_mib is None else f"{self.limit_mib} MiB"
        return f"{self.system.name}, {limit}"


def summarize_cases(cases: Sequence[Case]) -> list[Fields]:
    """Return the runs of the document. What a token takes to compute is the resident model's, the
    first case.
    """
    resident_seconds = [
        interval["seconds"]
        for case in cases[:1]
        for result in case.results
        for interval in result["intervals"]
        if interval["timed"]
    ]
    compute = statistics.median(resident_seconds) if resident_seconds else None
    contention = find_contention(cases)
    return [_summarize_case(case, compute, contention) for case in cases]


def find_contention(cases: Sequence[Case]) -> Fields | None:
    """Return how computing and the link slow each other, measured with the resident model."""
    measured = [result["contention"] for case in cases[:1] for result in case.results]
    return measured[-1] if measured else None


def _summarize_case(case: Case, compute_seconds: float | None, contention: Fields | None) -> Fields:
    survived = case.reason is None and bool(case.results)
    if not case.system.full_precision:
        compute_seconds = None  # compressed weights are computed with at a speed of their own
    figures = (
        summarize_run(case.results, compute_seconds=compute_seconds, contention=contention)
        if survived
        else summarize_failure()
    )
    match = min(case.matches, key=lambda match: match["tokens_equal"], default=None)
    if match is not None:
        match = {
            **match,
            "bit_equal": all(match["bit_equal"] for match in case.matches),
            "same_tokens": match["tokens_equal"] == match["passes"],
        }
    facts = case.results[-1] if survived else {}
    return {
        "name": case.system.name,
        "label": case.system.label,
        "peer": case.system.peer,
        "full_precision": case.system.full_precision,
        "limit_mib": case.limit_mib,
        "survived": survived,
        "reason": case.reason,
        **figures,
        **_memory(case),
        "cached_before_mib": case.cached_bytes / MIB,
        "match": match,
        "budget_bytes": facts.get("budget_bytes"),
        "anonymous_bytes": facts.get("anonymous_bytes"),
        "plan": facts.get("plan"),
    }


def find_problems(cases: Sequence[Case], runs: Sequence[Fields]) -> list[str]:
    """Return what must not be: a run of ours that failed, or a lossless one that lost something.

    Where the resident model is impossible there is nothing to compare with.
    """
    problems = []
    # Its products may depend on where its memory lies: then it is not its own equal either.
    itself = runs[0]["match"]
    what = "bit_equal" if itself is None or itself["bit_equal"] else "same_tokens"
    for case, run in zip(cases, runs, strict=True):
        if case.system.peer or case.impossible:
            continue
        if not run["survived"]:
            problems.append(f"{case.name}: {case.reason}")
        elif case.system.exact and not (run["match"] and run["match"][what]):
            if run["match"] or not cases[0].impossible:
                problems.append(f"{case.name}: {_NOT_EQUAL[what]}")
    return problems


def _memory(case: Case) -> Fields:
    """Return the peaks: those of the group, or of a GPU and then the group's as the host's."""
    group = _peak_mib([run.peak_bytes for run in case.limited])
    anonymous = _peak_mib([run.peak_anon_bytes for run in case.limited])
    device = [memory for result in case.results if (memory := result.get("device_memory"))]
    if not device:
        return {"peak_mib": group, "peak_anon_mib": anonymous}
    registered = [
        (result.get("plan") or {}).get("bytes_per_tier", {}).get("CPU", 0)
        for result in case.results
    ]  # ours registers its own memory, past torch's allocator
    return {
        "peak_mib": _peak_mib([memory["peak_reserved_bytes"] for memory in device]),
        "peak_anon_mib": None,
        "device_used_mib": _peak_mib([memory["device_used_bytes"] for memory in device]),
        "pinned_mib": _peak_mib(
            [memory["pinned_bytes"] + own for memory, own in zip(device, registered, strict=True)]
        ),
        "host_peak_mib": group,
        "host_peak_anon_mib": anonymous,
    }


def _peak_mib(peaks: Sequence[int]) -> float | None:
    return max(peaks) / MIB if peaks else None
