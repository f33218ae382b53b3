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
HEADS = (
    "weights held",
    "budget",
    "fast memory",
    "of full",
    "streamed",
    "tokens/s",
    "KL (nats/token)",
)


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
    hold all weights in fast memory; hollow ones stream some for each token.
    """
    full, points = document["full"], document["points"]
    least = min((point["kl_nats"] for point in points if point["kl_nats"] > 0), default=1e-4) / 4
    with picture(path, (9.6, 4.2), dpi) as figure:
        left, right = figure.subplots(1, 2)
        _draw(left, document, lambda point: max(point["kl_nats"], least))
        _name(left, document)
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
        right.plot([], [], "o", mfc="none", color=INK, label="hollow: streams under a budget")
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
    for start, label, color, marker, _ in _KINDS:
        found = [point for point in document["points"] if point["holding"].startswith(start)]
        resident = [point for point in found if not point["bytes_per_token"]]
        # Under a budget that has room for all of them weights are held as without one.
        distinct = {point["holding"]: point for point in reversed(resident)}
        streamed = [point for point in found if point["bytes_per_token"]]
        for points, fill in ((list(distinct.values()), color), (streamed, "none")):
            xs = [100 * point["fast_bytes"] / full["fast_bytes"] for point in points]
            ys = [value(point) for point in points]
            named = fill == color
            name = label if points and (named or not resident) else None
            axes.plot(xs, ys, marker, color=color, mfc=fill, label=name)
    axes.plot(100, value(full), "*", color=INK, ms=11, label="the full model")
    axes.set_xlim(0, 105)


def _name(axes: Any, document: Mapping[str, Any]) -> None:
    """Write how weights are held beside the points of the same KL. Memory tells them apart in the
    other picture.
    """
    full, points = document["full"], document["points"]
    for holding in dict.fromkeys(point["holding"] for point in points if point["kl_nats"] > 0):
        color, side = next(
            (color, side) for start, _, color, _, side in _KINDS if holding.startswith(start)
        )
        same = [point for point in points if point["holding"] == holding]
        shares = [100 * point["fast_bytes"] / full["fast_bytes"] for point in same]
        axes.annotate(
            holding.replace("epsilon ", "\u03b5 "),
            (max(shares) if side == "right" else min(shares), same[0]["kl_nats"]),
            xytext=(6 if side == "right" else -6, 0),
            textcoords="offset points",
            ha="left" if side == "right" else "right",
            va="center",
            fontsize=7,
            color=color,
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
        format_bytes(point["bytes_per_token"]) if point["bytes_per_token"] else "-",
        f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}",
        kl,
    )
