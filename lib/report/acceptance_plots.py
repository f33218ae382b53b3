"""The picture of what is accepted of drafts, against the bits of their weights.

The document is that of scripts/experiments/exact/measure_acceptance.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .drawing import BLUE, DPI, INK, ORANGE, SKY_BLUE, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_KINDS = {"chat": (BLUE, "o"), "code": (ORANGE, "s"), "prose": ("#009E73", "^")}
"""Kind of text -> colour and marker; another is sky blue."""
_MIXED = "mixed"
"""How the name of a copy begins whose blocks have several widths."""


def plot_acceptance(document: Mapping[str, Any], path: Path, *, dpi: int = DPI) -> None:
    """Draw a panel per model, and write a PNG; raises InputError where there is no model.

    Lines: uniform copies, sampled (solid) and greedy (dotted), and black what the hints predict of
    sampled ones. Hollow: mixed copies of the same bytes as a uniform one, sampled.
    """
    models = document["models"]
    if not models:
        raise InputError("the document has no model: there is nothing to draw")
    with picture(path, (4.2 * len(models), 4.0), dpi) as figure:
        row = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
        for axes, (name, model) in zip(row, models.items(), strict=True):
            _draw_model(axes, model["copies"])
            axes.set_title(name, fontsize=9)
            axes.set_xlabel("bits per weight, scales included")
            axes.set_ylim(-0.03, 1.03)
            axes.grid(alpha=0.3)
        row[0].set_ylabel("share of drafted tokens accepted")
        figure.legend(
            *row[0].get_legend_handles_labels(),
            frameon=False,
            fontsize=8,
            loc="outside upper center",
            ncols=1 + len(models),
        )


def _draw_model(axes: "Axes", copies: Mapping[str, Any]) -> None:
    uniform = [each for name, each in copies.items() if not name.startswith(_MIXED)]
    mixed = [each for name, each in copies.items() if name.startswith(_MIXED)]
    uniform.sort(key=lambda each: each["bits"])
    bits = [each["bits"] for each in uniform]
    for kind in uniform[0]["kinds"]:
        color, marker = _KINDS.get(kind, (SKY_BLUE, "D"))
        for way, line in (("sampled", "-"), ("greedy", ":")):
            shares = [each["kinds"][kind][way] for each in uniform]
            axes.plot(
                bits, shares, line, color=color, marker=marker, ms=4, lw=1.2, label=f"{kind}, {way}"
            )
        axes.plot(
            [each["bits"] for each in mixed],
            [each["kinds"][kind]["sampled"] for each in mixed],
            marker,
            color=color,
            ms=7,
            mfc="none",
            label=f"{kind}, mixed, sampled",
        )
    known = [each for each in uniform if each["predicted"] is not None]
    if known:
        axes.plot(
            [each["bits"] for each in known],
            [each["predicted"] for each in known],
            color=INK,
            lw=1.5,
            label="predicted, sampled",
        )
