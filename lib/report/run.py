"""A run's folder, read for the report: what is there, and the commands that make the rest."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..hints import Hints, load_hints
from .frontier import frontier_rows
from .tables import benchmark_sections

MODES = ("emulated", "real")


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """A part of the report that can't be made: why, and the command that helps."""

    part: str
    problem: str
    command: str


@dataclass(slots=True, kw_only=True)
class Run:
    """All that a report can be made of. Empty or None is a part that is missing."""

    directory: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, float]] = field(default_factory=list)
    heldout: Mapping[str, str] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    hints: Hints | None = None
    benchmarks: list[dict[str, Any]] = field(default_factory=list)
    frontier: Mapping[str, Any] = field(default_factory=dict)
    missing: list[Missing] = field(default_factory=list)

    @property
    def heldout_loss(self) -> float | None:
        """The last held-out loss in nats per token."""
        losses = [entry["heldout_loss"] for entry in self.metrics if "heldout_loss" in entry]
        return losses[-1] if losses else None

    @property
    def unigram_entropy(self) -> float | None:
        """What the held-out loss must be below, in nats per token."""
        text = self.heldout.get("unigram_entropy_nats")
        return None if text is None else float(text)


def load_run(directory: Path) -> Run:
    """Read a run's folder; only a folder without any part of a run is an InputError."""
    fix = "give the folder of a run, runs/<name>"
    if not directory.is_dir():
        problem = "is not a folder" if directory.exists() else "does not exist"
        raise InputError(f"run folder {str(directory)!r} {problem}: {fix}")
    run = Run(directory=directory)
    train = f"python -m gpt2.train --config {directory / '.config'}"
    checkpoint = directory / "checkpoint"
    sources: list[tuple[str, str, Path, Callable[[Path], object]]] = [
        ("config", "configuration", directory / "config.json", read_json),
        ("versions", "versions", directory / "versions.json", read_json),
        ("metrics", "training curve", directory / "metrics.jsonl", read_metrics),
        ("model", "model", checkpoint / "config.json", read_json),
        ("heldout", "held-out text", checkpoint / "heldout.safetensors", _read_metadata),
    ]
    for name, part, path, read in sources:
        try:
            setattr(run, name, read(path))
        except InputError as error:
            run.missing.append(Missing(part=part, problem=str(error), command=train))
    tiering = run.config.get("tiering") or {}
    hints_path = directory / str(tiering.get("json_output") or "tier_hints.json")
    if hints_path.exists() or tiering.get("generate_json", True):
        try:
            run.hints = load_hints(hints_path)
        except InputError as error:
            command = f"{train}  # with CONFIG_TIERING_GENERATE_JSON=y"
            run.missing.append(Missing(part="tier hints", problem=str(error), command=command))
    for mode in MODES:
        path = directory / f"benchmark_{mode}.json"
        if not path.exists() and mode not in _wanted_modes(run.config):
            continue
        try:
            run.benchmarks.append(_read_benchmark(path))
        except InputError as error:
            command = (
                f"tierhints benchmark --model {checkpoint} --tier-hints {hints_path} "
                f"--mode {mode} --json {path}"
            )
            part = f"benchmark, {mode}"
            run.missing.append(Missing(part=part, problem=str(error), command=command))
    path = directory / "frontier.json"
    if path.exists() or (run.config.get("bench") or {}).get("frontier"):
        try:
            run.frontier = _read_frontier(path)
        except InputError as error:
            command = (
                f"tierhints frontier --model {checkpoint} --tier-hints {hints_path} --json {path}"
            )
            run.missing.append(Missing(part="frontier", problem=str(error), command=command))
    if not (run.config or run.metrics or run.model or run.hints or run.benchmarks):
        raise InputError(f"folder {str(directory)!r} holds no part of a run: {fix}")
    return run


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises InputError that says whether it is absent or broken."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} can't be read: {error}") from error
    if not isinstance(document, dict):
        raise InputError(f"{path} is not a JSON object")
    return document


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read metrics.jsonl in step order, less a last line that a killed run left half-written."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} can't be read: {error}") from error
    entries: list[dict[str, float]] = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            entry["step"]
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise InputError(f"{path} line {number} is not a metrics entry with a step") from error
        entries.append(entry)
    return sorted(entries, key=lambda entry: entry["step"])


def _wanted_modes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the modes that the configuration benchmarks; all if it says nothing."""
    tiering, bench = config.get("tiering") or {}, config.get("bench") or {}
    if not tiering.get("inference_benchmark", True):
        return ()
    if "mode" not in tiering or bench.get("both_modes", True):
        return MODES
    return (str(tiering["mode"]),)


def _read_metadata(path: Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InputError(f"{path} does not exist")
    try:
        with safe_open(path, framework="np") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} can't be read: {error}") from error


def _read_frontier(path: Path) -> dict[str, Any]:
    document = read_json(path)
    try:
        frontier_rows(document)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"{path} is not a frontier of this version ({error!r})") from error
    return document


def _read_benchmark(path: Path) -> dict[str, Any]:
    document = read_json(path)
    try:
        benchmark_sections(document)
        document["tiered"]["stats"]["timeline"]
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(
            f"{path} is not a benchmark document of this version ({error!r})"
        ) from error
    return document
