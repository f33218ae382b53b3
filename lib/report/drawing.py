"""What the report's pictures share: colours, textures, and writing a picture in one step.

Colours are of the Okabe-Ito palette, which colour-blind readers can tell apart; textures carry the
same meaning in print. matplotlib is an extra, imported by functions that draw.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..extras import need_extra
from ..vocabulary import Tier

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150
INK = "#222222"
BLUE, SKY_BLUE, ORANGE = "#0072B2", "#56B4E9", "#D55E00"
TIER_COLORS = {
    Tier.HBM: ORANGE,
    Tier.CPU: BLUE,
    Tier.CXL: SKY_BLUE,
    Tier.PEER: "#CC79A7",
    Tier.SSD: "#F0E442",
    Tier.OBJECT: "#009E73",
}
TEXT_COLORS = {tier: "white" for tier in Tier} | {
    tier: "black" for tier in (Tier.CXL, Tier.PEER, Tier.SSD)
}
"""What can be read on a tier's colour."""
TIER_HATCHES = {
    Tier.HBM: "",
    Tier.CPU: "//",
    Tier.CXL: "\\\\",
    Tier.PEER: "xx",
    Tier.SSD: "..",
    Tier.OBJECT: "oo",
}
_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "hatch.linewidth": 0.5,
}


def need_matplotlib() -> None:
    """Raise InputError, with the command that installs it, where there is no matplotlib."""
    need_extra("report", "matplotlib")


@contextmanager
def picture(path: Path, size: tuple[float, float], dpi: int) -> "Iterator[Figure]":
    """Give an empty figure of ``size`` inches; once drawn, save it beside ``path`` and rename.

    Raises InputError where matplotlib isn't installed.
    """
    need_matplotlib()
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            figure.savefig(partial, format="png", dpi=dpi)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def split_layer(name: str) -> tuple[int | None, str]:
    """Split a block's name into its layer and the rest: ``transformer.h.3.attn`` is (3, "attn").

    The layer is the first part that is a number; None and the last part for a block outside.
    """
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return int(part), ".".join(parts[index + 1 :]) or parts[index - 1]
    return None, parts[-1]
