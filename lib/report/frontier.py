"""The frontier of a model as a table and a picture: fast memory against KL and tokens per second.

The document is that of ``tierhints frontier``.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..units import format_bytes
from .drawing import BLUE, DPI, INK, ORANGE, picture

_KINDS = (
    ("lossless", "lossless, streamed", INK, "s"),
    ("int", "uniform precision", BLUE, "o"),
    ("epsilon", "ours, within epsilon", ORANGE, "D"),
)
"""How a holding begins -> its name in the legend, colour and marker."""


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
    """Draw memory against KL, and memory against tokens per second, side by side."""
    full = document["full"]
    points = document["points"]
    with picture(path, (9.6, 4.2), dpi) as figure:
        left, right = figure.subplots(1, 2)
        _draw_kl(left, full, points)
        for label, marker, color, found in _grouped(points):
            xs = [100 * point["fast_bytes"] / full["fast_bytes"] for point in found]
            speeds = [point["tokens_per_s"] for point in found]
            right.plot(xs, speeds, marker, color=color, label=label)
            _name_points(right, xs, speeds, found, color)
        right.plot(100, full["tokens_per_s"], "*", color=INK, ms=11, label="the full model")
        right.set_ylabel("tokens per second, decoding")
        right.set_ylim(bottom=0)
        for axes in (left, right):
            axes.set_xlabel(
                f"fast memory, % of the full model's {format_bytes(full['fast_bytes'])}"
            )
            axes.set_xlim(0, 105)
            axes.grid(alpha=0.3)
        right.legend(frameon=False, fontsize=8)
        left.set_title("what memory costs in quality", fontsize=9, loc="left")
        right.set_title("and in speed", fontsize=9, loc="left")


def _draw_kl(axes: Any, full: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> None:
    lossy = [point["kl_nats"] for point in points if point["kl_nats"] > 0]
    floor = min(lossy, default=1e-4) / 4
    for label, marker, color, found in _grouped(points):
        xs = [100 * point["fast_bytes"] / full["fast_bytes"] for point in found]
        kl = [max(point["kl_nats"], floor) for point in found]
        axes.plot(xs, kl, marker, color=color, label=label)
        _name_points(axes, xs, kl, found, color)
    axes.plot(100, floor, "*", color=INK, ms=11)
    axes.axhline(floor, color=INK, lw=0.8, ls=":")
    axes.annotate("0: the same bits", (2, floor), fontsize=7, va="bottom", color=INK)
    axes.set_yscale("log")
    axes.set_ylabel("KL from the full model (nats per token)")


def _grouped(
    points: Sequence[Mapping[str, Any]],
) -> list[tuple[str, str, str, list[Mapping[str, Any]]]]:
    groups = []
    for start, label, color, marker in _KINDS:
        found = [point for point in points if point["holding"].startswith(start)]
        if found:
            groups.append((label, marker, color, found))
    return groups


def _name_points(
    axes: Any,
    xs: Sequence[float],
    ys: Sequence[float],
    found: Sequence[Mapping[str, Any]],
    color: str,
) -> None:
    for x, y, point in zip(xs, ys, found, strict=True):
        name = point["holding"].replace("epsilon ", "ε = ").replace("lossless", "")
        if point["budget_bytes"] is not None and name:
            name += " (budget)"
        axes.annotate(
            name, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=7, color=color
        )


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
