"""Files of what routers chose: the public ``route_trace v1``, as CSV, also with gzip.

Lines that begin with # come first: the model, its layers, the bytes of an expert in each. A line of
column names follows, then a row per expert used: turn, phase (0 prompt, 1 decode), step (place in
the context), layer, slot (0: the best), expert, weight, residency, expert_bytes. Columns are found
by name, and others are passed over; turn, slot, weight and residency may be missing, phase too
(then all is decode).
"""

import csv
import gzip
import io
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ..errors import InputError
from ..files import write_bytes
from ..policy.experts.routing import Cell, Trace

COLUMNS = (
    "turn",
    "phase",
    "step",
    "layer",
    "slot",
    "expert",
    "weight",
    "residency",
    "expert_bytes",
)
_NEEDED = ("step", "layer", "expert")
_LIMIT = 1 << 48
"""No number of a trace is that large."""


def read_trace(path: str | Path) -> Trace:
    """Read a trace, line by line; raises InputError naming the line for what makes no sense."""
    path = Path(path)
    reader = _Reader(path)
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as file:
            text = io.TextIOWrapper(file, encoding="utf-8-sig", newline=None)
            for number, line in enumerate(text, 1):
                reader.take(number, line.strip())
    except UnicodeDecodeError as error:
        raise InputError(f"trace {path} is not UTF-8 text: give a CSV, or .gz of one") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(
            f"trace {path} is not a whole gzip file ({error}): copy it anew"
        ) from error
    except OSError as error:
        raise InputError(f"trace {path} can't be read ({error.strerror}): give a file") from error
    return reader.trace()


def write_trace(trace: Trace, path: str | Path) -> None:
    """Write a trace, compressed if the name ends in ``.gz``; the same trace makes the same file."""
    data = "".join(_lines(trace)).encode()
    write_bytes(gzip.compress(data, mtime=0) if Path(path).suffix == ".gz" else data, path)


def make_trace(
    cells: Iterable[Cell],
    *,
    model: str,
    experts: Mapping[int, int],
    expert_bytes: Mapping[int, int],
) -> Trace:
    """Return the trace of cells; ``experts`` and ``expert_bytes`` are by layer."""
    cells = tuple(cells)
    per_token: dict[int, int] = {}
    for cell in cells:
        per_token[cell.layer] = max(per_token.get(cell.layer, 0), len(cell.experts))
    return Trace(
        model=model,
        experts={layer: experts[layer] for layer in sorted(per_token)},
        per_token={layer: per_token[layer] for layer in sorted(per_token)},
        expert_bytes={layer: expert_bytes[layer] for layer in sorted(per_token)},
        cells=cells,
    )


class _Reader:
    """A trace as far as it has been read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._columns: dict[str, int] = {}
        self._facts: dict[str, str] = {}
        self._layer_bytes: dict[int, int] = {}
        self._cells: dict[tuple[int, bool, int, int], dict[int, tuple[int, float]]] = {}
        self._lines: dict[tuple[int, bool, int, int], int] = {}

    def take(self, number: int, line: str) -> None:
        """Take in one line, without its end."""
        if not line:
            return
        try:
            if line.startswith("#"):
                self._take_header(line)
            elif not self._columns:
                self._take_columns([name.strip() for name in next(csv.reader([line]))])
            else:
                self._take_row(number, line.split(","))
        except ValueError as error:
            raise InputError(f"trace {self._path}, line {number}: {error}") from error

    def trace(self) -> Trace:
        """Return what was read; raises InputError where it is no recording of decoding."""
        if not any(decode for _, decode, _, _ in self._cells):
            raise InputError(
                f"trace {self._path} has no decode step (phase 1): record some decoded tokens"
            )
        cells = []
        for (turn, decode, step, layer), slots in self._cells.items():
            ordered = sorted(slots.items())
            weights = tuple(weight for _, (_, weight) in ordered)
            known = not any(map(math.isnan, weights))
            experts = tuple(expert for _, (expert, _) in ordered)
            cells.append(Cell(turn, decode, step, layer, experts, weights if known else None))
        layers = {cell.layer for cell in cells}
        return make_trace(
            cells,
            model=self._facts.get("model", ""),
            experts=self._expert_counts(cells),
            expert_bytes={layer: self._layer_bytes.get(layer, 0) or 1 for layer in layers},
        )

    def _expert_counts(self, cells: Iterable[Cell]) -> dict[int, int]:
        """Return by layer what the header says, or one more than the highest that is used."""
        counts: dict[int, int] = {}
        for cell in cells:
            counts[cell.layer] = max(counts.get(cell.layer, 0), max(cell.experts) + 1)
        said = self._fact("n_expert")
        return counts if said is None else dict.fromkeys(counts, said)

    def _take_header(self, line: str) -> None:
        version = re.match(r"#\s*route_trace\s+(\S+)", line)
        if version and version[1] != "v1":
            raise ValueError(f"route_trace {version[1]} is not known: give v1")
        facts = dict(re.findall(r"(\w+)=(\S+)", line))
        if "layer" not in facts:
            self._facts |= facts
            for name in ("n_layer", "n_expert", "n_expert_used"):
                self._fact(name)
        elif "expert_bytes" in facts:
            layer = _number(facts["layer"], "layer")
            self._layer_bytes[layer] = _number(facts["expert_bytes"], "expert_bytes")

    def _take_columns(self, names: list[str]) -> None:
        if names and names[0].lstrip("-").isdigit():
            raise ValueError(f"no line of column names above it: add {','.join(COLUMNS)}")
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"column {name!r} appears twice: keep one")
        missing = [name for name in _NEEDED if name not in names]
        if missing:
            raise ValueError(f"no column {', '.join(missing)}: there are {', '.join(names)}")
        self._columns = {name: place for place, name in enumerate(names)}

    def _take_row(self, number: int, fields: list[str]) -> None:
        if len(fields) != len(self._columns):
            raise ValueError(f"{len(fields)} fields, and there are {len(self._columns)} columns")

        def field(name: str, default: int = 0) -> int:
            place = self._columns.get(name)
            return default if place is None else _number(fields[place], name)

        phase = field("phase", 1)
        if phase not in (0, 1):
            raise ValueError(f"phase {phase}: 0 is the prompt, 1 is decoding")
        layer, expert = field("layer"), field("expert")
        for name, value in (("n_layer", layer), ("n_expert", expert)):
            if (most := self._fact(name)) is not None and value >= most:
                raise ValueError(f"{name[2:]} {value} of {most}: give 0 to {most - 1}")
        weight = math.nan
        if "weight" in self._columns:
            weight = float(fields[self._columns["weight"]])  # nan: not known
        place = (field("turn"), phase == 1, field("step"), layer)
        cell = self._cells.setdefault(place, {})
        slot = field("slot", len(cell))
        said = self._lines.setdefault(place, number)
        if slot in cell or any(expert == other for other, _ in cell.values()):
            raise ValueError(
                f"slot {slot}, expert {expert} is a second one of step {place[2]} in layer "
                f"{layer}, which began on line {said}: several prompts need a column turn"
            )
        used = self._fact("n_expert_used")
        if used is not None and len(cell) >= used:
            raise ValueError(
                f"more than the {used} experts of the header for step {place[2]} in layer {layer}, "
                f"which began on line {said}: several prompts need a column turn"
            )
        cell[slot] = (expert, weight)
        if size := field("expert_bytes"):
            self._layer_bytes.setdefault(layer, size)

    def _fact(self, name: str) -> int | None:
        """Return a number of the header."""
        return _number(self._facts[name], name) if name in self._facts else None


def _number(text: str, name: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value < _LIMIT:
        raise ValueError(f"{name} {text.strip()!r} is not a number from 0")
    return value


def _lines(trace: Trace) -> Iterator[str]:
    layers = max(trace.experts) + 1
    yield "# route_trace v1\n"
    yield (
        f"# model={'_'.join(trace.model.split())} n_layer={layers} "
        f"n_expert={max(trace.experts.values())} n_expert_used={max(trace.per_token.values())}\n"
    )
    for layer, size in trace.expert_bytes.items():
        yield f"# layer={layer} expert_bytes={size}\n"
    yield ",".join(COLUMNS) + "\n"
    for cell in trace.cells:
        weights = cell.weights or (math.nan,) * len(cell.experts)
        for slot, (expert, weight) in enumerate(zip(cell.experts, weights, strict=True)):
            yield (
                f"{cell.turn},{int(cell.decode)},{cell.step},{cell.layer},{slot},{expert},"
                f"{weight:.6g},0,{trace.expert_bytes[cell.layer]}\n"
            )
