"""From what workers measured to rows, ratios and the table: pure functions of plain data.

roofline share = (bytes that a step reads / measured read bandwidth) / time of the step: 1 where
weights are read at the speed of memory and nothing else takes time. Activations and the cache of
keys and values are no part of the bytes.
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lib.units import GB
from scripts.experiments.decode.peers.base import COMPILED, EAGER, NATIVE, Sizes

PREFILL = "prefill"
Fields = dict[str, Any]
"""A part of the JSON document."""
RATIOS = {
    "int4_vs_llama_cpp": "int4",
    "int8_vs_llama_cpp": "int8",
    "int4_vs_fp32": "int4",
    "int8_vs_fp32": "int8",
    "epsilon_0.02_vs_fp32": "epsilon-0.02",
    "attached_vs_plain": "lossless",
}
"""Name -> our width in it: against plain fp32, or what llama.cpp has nearest in bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What was timed of one system in one mode: ``tokens`` in each of ``seconds``."""

    system: str
    width: str
    mode: str
    batch: int
    tokens: int
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What a system's logits say of the text, against the fp32 model's."""

    kl_nats: float
    perplexity: float


def make_row(
    cell: Cell, sizes: Sizes, judged: Judged | None, *, num_weights: int, bandwidth_gb_s: float
) -> Fields:
    """Return a row of the document. ``num_weights``: of the checkpoint's matrices."""
    median = statistics.median(cell.seconds)
    limit_seconds = sizes.read_bytes / (bandwidth_gb_s * GB)
    return {
        "system": cell.system,
        "width": cell.width,
        "mode": cell.mode,
        "batch": cell.batch,
        "ms_per_token": 1e3 * median / cell.tokens,
        "p95_ms_per_token": 1e3 * float(np.percentile(cell.seconds, 95)) / cell.tokens,
        "n": len(cell.seconds),
        "bytes_per_weight": sizes.held_bytes / num_weights,
        "kl": None if judged is None else judged.kl_nats,
        "perplexity": None if judged is None else judged.perplexity,
        "roofline_share": None if cell.mode == PREFILL else limit_seconds / median,
    }


def find_ratios(rows: Sequence[Fields], mode: str) -> tuple[dict[str, float | None], Fields]:
    """Return how many times as fast ours is in a mode, at batch 1; and what llama.cpp's width was
    nearest. None: one of the two was not run.
    """
    found: dict[str, float | None] = {}
    nearest: Fields = {}
    single = [row for row in rows if row["batch"] == 1]
    plain = _find(single, "transformers", "fp32", mode)
    peers = [row for row in single if (row["system"], row["mode"]) == ("llama.cpp", NATIVE)]
    for name, width in RATIOS.items():
        ours = _find(single, "ours", width, mode)
        other = plain
        if name.endswith("llama_cpp"):
            other = None if ours is None else nearest_in_bytes(peers, ours["bytes_per_weight"])
            nearest[width] = None if other is None else other["width"]
        found[name] = (
            None if ours is None or other is None else other["ms_per_token"] / ours["ms_per_token"]
        )
    return found, nearest


def nearest_in_bytes(rows: Iterable[Fields], bytes_per_weight: float) -> Fields | None:
    """Return the row whose weights take most nearly so many bytes each; None without rows."""
    return min(rows, key=lambda row: abs(row["bytes_per_weight"] - bytes_per_weight), default=None)


def _find(rows: Iterable[Fields], system: str, width: str, mode: str) -> Fields | None:
    wanted = (system, width, mode)
    return next((row for row in rows if (row["system"], row["width"], row["mode"]) == wanted), None)


def table(document: Fields) -> str:
    """Return the document for people: a table for each model."""
    lines = [
        f"{document['machine']['cpu']}, {document['machine']['threads']} threads, memory is read "
        f"at {document['bandwidth_gb_s']:.1f} GB/s"
    ]
    for name, model in document["models"].items():
        lines += ["", name, *_model_lines(model)]
    return "\n".join(lines)


def _model_lines(model: Fields) -> list[str]:
    heads = ("system", "width", "mode", "batch", "ms/token", "p95", "n", "bytes/weight", "KL")
    cells = [(*heads, "perplexity", "roofline")]
    for row in model["rows"]:
        cells.append(
            (
                row["system"],
                row["width"],
                row["mode"],
                str(row["batch"]),
                f"{row['ms_per_token']:.2f}",
                f"{row['p95_ms_per_token']:.2f}",
                str(row["n"]),
                f"{row['bytes_per_weight']:.3f}",
                _number(row["kl"], ".5f"),
                _number(row["perplexity"], ".3f"),
                _number(row["roofline_share"], ".0%"),
            )
        )
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column < 3 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]
    lines.insert(1, "-" * len(lines[0]))
    for mode, key in ((COMPILED, "ratios"), (EAGER, "ratios_eager")):
        found = ", ".join(f"{name} {_number(ratio, '.2f')}" for name, ratio in model[key].items())
        lines.append(f"times as fast at batch 1, {mode}: {found}")
    for title, reasons in (("absent", model["absent"]), ("failed", model["failed"])):
        lines += [f"{title}: {name}: {reason}" for name, reason in reasons.items()]
    return lines


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
