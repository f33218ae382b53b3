"""The frontier of a model as a table and a picture: fast memory against KL and tokens per second.

The document is that of ``tierhints frontier``.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..units import format_bytes
from .drawing import BLUE, DPI, INK, ORANGE, picture

_KINDS = (
    ("lossless", "lossless", INK, "s", "right"),
    ("int", "uniform precision", BLUE, "o", "right"),
    ("epsilon", "ours, within epsilon", ORANGE, "D", "left"),
)
"""How a holding begins -> its name in the legend, colour, marker, and the side of its names."""


HEADS = ("weights held", "budget", "fast memory", "of full", "tokens/s", "KL (nats/token)")


def frontier_rows(document: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return a row per point: how weights are held, under which budget, and what that gives."""
    full = document["full"]
    return [_row(point, full) for point in (full, *document["points"])]


def frontier_table(document: Mapping[str, Any]) -> str:
    """Return ``frontier_rows`` as text, with the settings that don't fit and why."""
    rows = [HEADS, *frontier_rows(document)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    for refused in document["refused"]:
        budget = refused["budget_bytes"]
        under = "" if budget is None else f" under {format_bytes(budget)}"
        lines.append(f"{refused['holding']}{under}: {refused['reason']}")
    return "\n".join(lines)


def plot_frontier(document: Mapping[str, Any], path: Path, *, dpi: int = DPI) -> None:
    """Draw memory against KL, and memory against tokens per second, side by side. Filled points
    hold all weights in fast memory; hollow ones stream what a budget has no room for.
    """
    full, points = document["full"], document["points"]
    least = min((point["kl_nats"] for point in points if point["kl_nats"] > 0), default=1e-4) / 4
    with picture(path, (9.6, 4.2), dpi) as figure:
        left, right = figure.subplots(1, 2)
        _draw(left, document, lambda point: max(point["kl_nats"], least))
        left.axhline(least, color=INK, lw=0.8, ls=":")
        left.annotate(
            "0: the same bits",
            (0.02, least),
            xycoords=("axes fraction", "data"),
            fontsize=7,
            va="bottom",
            color=INK,
        )
        left.set_yscale("log")
        left.set_ylabel("KL from the full model (nats per token)")
        left.set_title("what memory costs in quality", fontsize=9, loc="left")
        _draw(right, document, lambda point: point["tokens_per_s"])
        right.set_yscale("log")
        right.yaxis.set_major_formatter("{x:g}")
        right.yaxis.set_minor_formatter("{x:g}")
        right.set_ylabel("tokens per second, decoding")
        right.set_title("and in speed", fontsize=9, loc="left")
        right.plot([], [], "o", mfc="none", color=INK, label="hollow: streamed under a budget")
        right.legend(frameon=False, fontsize=8)
        size = format_bytes(full["fast_bytes"])
        for axes in (left, right):
            axes.set_xlabel(f"fast memory, % of the full model's {size}")
            axes.grid(alpha=0.3)


def _draw(
    axes: Any, document: Mapping[str, Any], value: Callable[[Mapping[str, Any]], float]
) -> None:
    """Draw every point of a document over its share of the full model's memory."""
    full = document["full"]
    for start, label, color, marker, side in _KINDS:
        found = [point for point in document["points"] if point["holding"].startswith(start)]
        resident = [point for point in found if point["budget_bytes"] is None]
        for points, fill in ((resident, color), ([p for p in found if p not in resident], "none")):
            xs = [100 * point["fast_bytes"] / full["fast_bytes"] for point in points]
            ys = [value(point) for point in points]
            name = label if points and (points is resident or not resident) else None
            axes.plot(xs, ys, marker, color=color, mfc=fill, label=name)
            for x, y, point in zip(xs, ys, points, strict=True) if points is resident else ():
                axes.annotate(
                    point["holding"].replace("epsilon ", "\u03b5 = "),
                    (x, y),
                    xytext=(6 if side == "right" else -6, 0),
                    textcoords="offset points",
                    ha="left" if side == "right" else "right",
                    va="center",
                    fontsize=7,
                    color=color,
                )
    axes.plot(100, value(full), "*", color=INK, ms=11, label="the full model")
    axes.set_xlim(0, 105)


def _row(point: Mapping[str, Any], full: Mapping[str, Any]) -> tuple[str, ...]:
    budget, interval = point["budget_bytes"], point["kl_interval"]
    kl = "0" if point["kl_nats"] == 0 else f"{point['kl_nats']:.2g}"
    if interval is not None and point["kl_nats"] > 0:
        kl += f" ({interval[0]:.2g} to {interval[1]:.2g})"
    if point["bound_nats"] is not None:
        kl += f", at most {point['bound_nats']:.2g}"
    speed = point["tokens_per_s"]
    name = "the full model" if point is full else point["holding"]
    return (
        name,
        "-" if budget is None else format_bytes(budget),
        format_bytes(point["fast_bytes"]),
        f"{point['fast_bytes'] / full['fast_bytes']:.0%}",
        f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}",
        kl,
    )
