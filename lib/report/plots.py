"""Pictures of training and hints: loss curve, importance heat map, tier map.

Every function writes one PNG file in one step and raises InputError, saying what is missing, where
the data hold nothing to draw.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..hints import Hints, rank_blocks
from ..units import format_bytes
from ..vocabulary import Tier
from .drawing import (
    DPI,
    INK,
    ORANGE,
    SKY_BLUE,
    TEXT_COLORS,
    TIER_COLORS,
    TIER_HATCHES,
    need_matplotlib,
    picture,
    split_layer,
)
from .run import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAX_ANNOTATED_CELLS = 240
_UNKNOWN: dict[str, Any] = {"facecolor": "white", "edgecolor": "#888888", "hatch": "////"}
_LABELLED_WIDTH, _UPRIGHT_WIDTH = 0.014, 0.07
"""Fractions of a tier map's width from which a block has room for its name, and for it upright."""


def plot_loss(
    metrics_path: Path, path: Path, unigram_entropy: float | None = None, *, dpi: int = DPI
) -> None:
    """Draw training and held-out loss of a metrics.jsonl over steps, in nats per token.

    ``unigram_entropy`` is the loss of the best model that ignores context: the mark to beat.
    """
    metrics = read_metrics(metrics_path)
    train = [(entry["step"], entry["loss"]) for entry in metrics if "loss" in entry]
    heldout = [
        (entry["step"], entry["heldout_loss"]) for entry in metrics if "heldout_loss" in entry
    ]
    if not train and not heldout:
        raise InputError(f"{metrics_path} holds no loss yet: train for a step at least")
    with picture(path, (8, 4.2), dpi) as figure:
        axes = figure.add_subplot()
        if train:
            axes.plot(*zip(*train, strict=True), color=SKY_BLUE, lw=1, label="training, each step")
        if heldout:
            steps, losses = zip(*heldout, strict=True)
            label = f"held-out text, {losses[-1]:.3f} at the end"
            axes.plot(steps, losses, color=ORANGE, lw=1.8, marker="o", ms=4, label=label)
        if unigram_entropy is not None:
            label = f"unigram entropy of held-out text, {unigram_entropy:.3f}"
            axes.axhline(unigram_entropy, color=INK, ls="--", lw=1, label=label)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("loss (nats per token)")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)


def plot_importance(hints: Hints, path: Path, *, dpi: int = DPI) -> None:
    """Draw each block's importance: a row per layer, a column per kind, the rest beside them."""
    need_matplotlib()
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Patch

    known = [hint.importance for hint in hints.blocks.values() if hint.importance]
    if not known:
        raise InputError("the hints hold no importance (flat hints): make them from a signal")
    norm = LogNorm(vmin=min(min(known), 0.1), vmax=1.0)
    grids = [grid for grid in _importance_grids(list(hints.blocks)) if grid[2]]
    num_rows = max(len(cells) for _, _, cells in grids)
    widths = [max(len(columns), 1.5) for _, columns, _ in grids]
    size = (min(14.0, max(8.0, 3.4 + 0.95 * sum(widths))), 1.2 + 0.42 * max(num_rows, 4))
    with picture(path, size, dpi) as figure:
        panels = figure.subplots(1, len(grids), width_ratios=widths, squeeze=False)[0]
        for axes, (rows, columns, cells) in zip(panels, grids, strict=True):
            _draw_cells(axes, hints, cells, norm)
            axes.set_ylim(num_rows - 0.5, -0.5)
            rotation = 90 if len(columns) > 12 else 0
            axes.set_xticks(range(len(columns)), columns, rotation=rotation)
            axes.set_yticks(range(len(rows)), rows)
            axes.xaxis.tick_top()
        bar = figure.colorbar(ScalarMappable(norm, "viridis"), ax=list(panels), pad=0.02)
        bar.set_label("importance: signal per weight,\ndensest block = 1")
        if any(hint.importance is None for hint in hints.blocks.values()):
            unknown = Patch(**_UNKNOWN, label="no signal")
            figure.legend(handles=[unknown], frameon=False, loc="outside upper right")


def plot_tiers(hints: Hints, path: Path, *, dpi: int = DPI) -> None:
    """Draw each block as wide as its bytes, coloured by tier: in model order, then by rank."""
    need_matplotlib()
    from matplotlib.patches import Patch

    sizes = {name: hint.num_bytes for name, hint in hints.blocks.items() if hint.num_bytes}
    if len(sizes) < len(hints.blocks):
        raise InputError("the hints hold no byte counts (flat hints): make them from a signal")
    total = sum(sizes.values())
    ranked = rank_blocks({name: hint.importance for name, hint in hints.blocks.items()})
    thresholds = hints.provenance.get("thresholds") or {}
    with picture(path, (10, 4.4), dpi) as figure:
        axes = figure.add_subplot()
        for y, order in ((1, list(sizes)), (0, ranked)):
            start = 0.0
            for name in order:
                width = sizes[name] / total
                _draw_block(axes, name, hints.blocks[name].tier, start, width, y)
                start += width
        for key, value in thresholds.items():
            axes.plot([value] * 2, [-0.46, 0.46], color=INK, lw=1.4, ls=(0, (4, 2)))
            label = f"{key.upper()} threshold {value:g}"
            axes.annotate(label, (value, -0.48), ha="center", va="top", fontsize=8)
        axes.set_yticks([1, 0], ["in model order", "most important\nfirst"])
        axes.set_xlim(0, 1)
        axes.set_ylim(-0.7, 1.5)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set_xlabel(f"weight bytes ({format_bytes(total)} in {len(sizes)} blocks)")
        handles = []
        for tier, num_bytes in tier_bytes(hints).items():
            label = f"{tier}  {format_bytes(num_bytes)} ({num_bytes / total:.0%})"
            style: dict[str, Any] = {"facecolor": TIER_COLORS[tier], "edgecolor": "white"}
            handles.append(Patch(**style, hatch=TIER_HATCHES[tier], label=label))
        above: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1)}
        axes.legend(handles=handles, frameon=False, ncols=len(handles), **above)


def plot_attention(hints: Hints, path: Path, *, dpi: int = DPI) -> None:
    """Draw ``attention_fim_trace`` per layer and head: 1 - sum_j p_j^2, near 0 where peaked."""
    traces = attention_traces(hints)
    if not traces:
        raise InputError("the hints hold no attention_fim_trace: set HINTS_ATTENTION_SEQUENCES")
    num_heads = max(map(len, traces.values()))
    size = (min(14.0, max(8.0, 3.0 + 0.55 * num_heads)), 1.2 + 0.42 * max(len(traces), 4))
    with picture(path, size, dpi) as figure:
        axes = figure.add_subplot()
        padded = [values + [math.nan] * (num_heads - len(values)) for values in traces.values()]
        image = axes.imshow(padded, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        if num_heads * len(traces) <= _MAX_ANNOTATED_CELLS:
            for y, values in enumerate(traces.values()):
                for x, value in enumerate(values):
                    style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7}
                    ink = "white" if value < 0.5 else "black"
                    axes.annotate(f"{value:.2f}", (x, y), color=ink, **style)
        axes.set_xlabel("head")
        axes.set_xticks(range(num_heads))
        axes.set_yticks(range(len(traces)), [f"layer {split_layer(name)[0]}" for name in traces])
        figure.colorbar(image, ax=axes).set_label("attention_fim_trace")


def attention_traces(hints: Hints) -> dict[str, list[float]]:
    """Return block name -> trace per head, for the blocks that have one."""
    return {
        name: [float(value) for value in values]
        for name, hint in hints.blocks.items()
        if not isinstance(values := hint.signals.get("attention_fim_trace", 0.0), int | float)
    }


def tier_bytes(hints: Hints) -> dict[Tier, int]:
    """Return weight bytes per tier that holds any, nearest first; a flat file knows none."""
    sums = {tier: 0 for tier in Tier}
    for hint in hints.blocks.values():
        sums[hint.tier] += hint.num_bytes or 0
    return {tier: num_bytes for tier, num_bytes in sums.items() if num_bytes}


_Grid = tuple[list[str], list[str], list[list[str | None]]]
"""Row labels, column labels, and the block name in each cell."""


def _importance_grids(names: Sequence[str]) -> tuple[_Grid, _Grid]:
    """Arrange blocks: those of layers as layer by kind, those outside as one column."""
    layers: dict[int, dict[str, str]] = {}
    columns: dict[str, None] = {}
    outside: list[str] = []
    for name in names:
        layer, kind = split_layer(name)
        if layer is None:
            outside.append(name)
        else:
            layers.setdefault(layer, {})[kind] = name
            columns[kind] = None
    cells = [[layers[layer].get(kind) for kind in columns] for layer in sorted(layers)]
    inner: _Grid = ([f"layer {layer}" for layer in sorted(layers)], list(columns), cells)
    outer_rows = [split_layer(name)[1] for name in outside]
    return inner, (outer_rows, ["outside layers"], [[name] for name in outside])


def _draw_cells(axes: "Axes", hints: Hints, cells: list[list[str | None]], norm: Any) -> None:
    """Colour a grid by importance: hatched without a signal, empty where there is no block."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    num_columns = len(cells[0])
    annotate = len(cells) * num_columns <= _MAX_ANNOTATED_CELLS
    places = [(x, y, name) for y, row in enumerate(cells) for x, name in enumerate(row) if name]
    for x, y, name in places:
        importance = hints.blocks[name].importance
        corner = (x - 0.5, y - 0.5)
        if importance is None:
            axes.add_patch(Rectangle(corner, 1, 1, **_UNKNOWN))
            continue
        color = colormaps["viridis"](norm(max(importance, norm.vmin)))
        axes.add_patch(Rectangle(corner, 1, 1, facecolor=color, edgecolor="white"))
        if annotate:
            luminance = 0.3 * color[0] + 0.59 * color[1] + 0.11 * color[2]
            ink = "white" if luminance < 0.5 else "black"
            text = _format_importance(importance)
            axes.annotate(text, (x, y), ha="center", va="center", fontsize=8, color=ink)
    axes.set_xlim(-0.5, num_columns - 0.5)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _format_importance(importance: float) -> str:
    return f"{importance:.2g}" if importance >= 1e-3 else f"{importance:.0e}".replace("e-0", "e-")


def _draw_block(axes: "Axes", name: str, tier: Tier, start: float, width: float, y: float) -> None:
    from matplotlib.patheffects import withStroke

    color = TIER_COLORS[tier]
    edge = 0.6 if width > 0.003 else 0.0  # a border would hide the smallest blocks
    style: dict[str, Any] = {"color": color, "edgecolor": "white", "lw": edge}
    axes.barh(y, width, left=start, height=0.8, hatch=TIER_HATCHES[tier], **style)
    if width <= _LABELLED_WIDTH:
        return
    layer, kind = split_layer(name)
    axes.annotate(
        kind if layer is None else f"{layer}.{kind}",
        (start + width / 2, y),
        ha="center",
        va="center",
        rotation=0 if width > _UPRIGHT_WIDTH else 90,
        fontsize=8,
        color=TEXT_COLORS[tier],
        path_effects=[withStroke(linewidth=3, foreground=color)],  # where a threshold runs through
    )
