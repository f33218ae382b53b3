"""A controller's log, played again: the same observations must give the same decisions.

``read_log`` reads lines as ``tiering.control.log`` writes them: for each run a header, then an
observation a line with what was decided about it, and now and then the hash of the state. A line
that was torn (the machine went down in the middle of it) is left out where nothing of its run
follows.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError
from ..machine import TierSpec
from ..vocabulary import Tier
from .control import POLICY_VERSION, Controller, Settings
from .events import SCHEMA_VERSION, Observation, read_observation, write_event


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A line of a log: what was seen, what was decided (None: nothing), and the state's hash."""

    line: int
    observation: Observation
    decision: Mapping[str, Any] | None
    digest: str | None


@dataclass(slots=True, kw_only=True)
class Run:
    """One run of a log."""

    settings: Settings
    tiers: Mapping[Tier, TierSpec]
    """How fast the tiers were, as the run's planner knew them."""
    entries: list[Entry] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """What a log holds. ``torn``: the numbers of lines that were left out."""

    runs: list[Run]
    torn: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The first thing that came out otherwise: ``what`` is the decision, or the hash."""

    run: int
    line: int
    sequence: int
    what: str
    logged: Any
    replayed: Any


def read_log(lines: Iterable[str]) -> Log:
    """Read a log; raises InputError for one that is none, of another version, or lacks lines."""
    runs: list[Run] = []
    torn: list[int] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            torn.append(number)
            continue
        if not isinstance(entry, dict) or not entry.keys() & {"header", "observation"}:
            raise InputError(f"line {number} is no entry of a controller's log")
        if "header" in entry:
            runs.append(_read_header(entry["header"], number))
            continue
        if not runs:
            raise InputError(f"line {number}: the log has no header before it")
        observation = read_observation(entry["observation"])
        expected = len(runs[-1].entries)
        if observation.sequence != expected:
            raise InputError(
                f"line {number}: observation {observation.sequence} where {expected} comes next; "
                "lines are missing"
            )
        before = runs[-1].entries[-1].observation.time_us if expected else 0
        if observation.time_us < before:
            raise InputError(f"line {number}: time runs back from {before} us")
        runs[-1].entries.append(
            Entry(
                line=number,
                observation=observation,
                decision=entry.get("decision"),
                digest=entry.get("digest"),
            )
        )
    if not runs:
        raise InputError("the log is empty: it has no header")
    return Log(runs=runs, torn=torn)


def replay(log: Log) -> Difference | None:
    """Decide again; returns the first difference, or None."""
    return next(_differences(log), None)


def _differences(log: Log) -> Iterator[Difference]:
    for number, run in enumerate(log.runs):
        controller = Controller(run.settings)
        for entry in run.entries:
            decision = controller.observe(entry.observation)
            found = None if decision is None else json.loads(json.dumps(write_event(decision)))
            for what, logged, replayed in (
                ("decision", entry.decision, found),
                ("digest", entry.digest, entry.digest and controller.digest()),
            ):
                if logged != replayed:
                    yield Difference(
                        run=number,
                        line=entry.line,
                        sequence=entry.observation.sequence,
                        what=what,
                        logged=logged,
                        replayed=replayed,
                    )


def _read_header(header: Mapping[str, Any], number: int) -> Run:
    versions = header.get("schema_version"), header.get("policy_version")
    if versions != (SCHEMA_VERSION, POLICY_VERSION):
        raise InputError(
            f"line {number}: the log is of schema {versions[0]} and policy {versions[1]}, and this "
            f"is schema {SCHEMA_VERSION}, policy {POLICY_VERSION}: replay it with the version that "
            "wrote it"
        )
    try:
        settings = Settings(**header["settings"])
        tiers = {
            Tier(name): TierSpec(name, spec["setup_us"], spec["bandwidth_gb_s"])
            for name, spec in header["tiers"].items()
        }
    except (TypeError, KeyError, ValueError) as error:
        raise InputError(f"line {number}: the header is wrong: {error}") from error
    return Run(settings=settings, tiers=tiers)
