"""The picture of a what-if sweep: predicted tokens per second over bandwidth, a line per budget.

The document is that of tierhints what-if.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..units import format_bytes
from .drawing import DPI, INK, need_matplotlib, picture

_MARKERS = "os^Dv<>pP*"


def plot_what_if(document: Mapping[str, Any], path: Path, *, dpi: int = DPI) -> None:
    """Draw a sweep; raises InputError where no budget of it was large enough."""
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in document["rows"]:
        if row["tokens_per_s"] is not None:
            lines.setdefault(row["budget"], []).append(row)
    if not lines:
        raise InputError("every budget of the sweep is too small: there is nothing to draw")
    need_matplotlib()
    from matplotlib import colormaps

    colors = colormaps["viridis"].resampled(max(len(lines), 2))
    with picture(path, (8, 4.6), dpi) as figure:
        axes = figure.add_subplot()
        for index, (label, rows) in enumerate(lines.items()):
            size = format_bytes(rows[0]["hbm_bytes"])
            axes.plot(
                [row["bandwidth_gb_s"] for row in rows],
                [row["tokens_per_s"] for row in rows],
                color=colors(0.9 * index / max(len(lines) - 1, 1)),
                marker=_MARKERS[index % len(_MARKERS)],
                label=label if label == size else f"{label} ({size})",
            )
        resident = document["resident_tokens_per_s"]
        axes.axhline(resident, color=INK, ls="--", lw=1, label="everything resident")
        own = document["machine"]["tiers"].get(document["tier"])
        if own is not None:
            label = f"{document['tier']} of {document['machine']['name']}"
            axes.axvline(own["bandwidth_gb_s"], color=INK, ls=":", lw=1, label=label)
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
        axes.set_xlabel(f"bandwidth of {document['tier']} (GB/s)")
        axes.set_ylabel("tokens per second (predicted)")
        title = f"{format_bytes(document['weight_bytes'])} of weights, {document['precision']}"
        axes.set_title(title, fontsize=9, loc="left")
        axes.grid(alpha=0.3, which="both")
        axes.legend(title="HBM budget", frameon=False, fontsize=8)
