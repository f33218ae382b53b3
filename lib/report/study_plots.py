"""The picture of the signals study: how well Adam's moment stands for Fisher information.

The document is that of scripts/experiments/study/study_signals.py.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .drawing import BLUE, DPI, INK, ORANGE, SKY_BLUE, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GREY, _GREEN = "#888888", "#009E73"
_SIGNALS: Mapping[str, tuple[str, str, str]] = {
    "adam": ("Adam's moment", ORANGE, "o"),
    "single_batch": ("one batch's squared gradient", _GREEN, "x"),
    "fisher_empirical": ("empirical Fisher", SKY_BLUE, "s"),
    "fisher_true": ("true Fisher", BLUE, "D"),
    "oracle": ("measured KL", INK, "*"),
    "magnitude": ("error alone", _GREY, "^"),
    "adam_trace": ("Adam's moment alone", "#CC79A7", "v"),
    "random": ("random", "#F0E442", "P"),
}
"""Label, colour and marker of each."""
_PAIRS = {
    "fisher_true~fisher_true": ("two halves of the true Fisher", BLUE, "D"),
    "fisher_empirical~fisher_true": ("empirical with true Fisher", SKY_BLUE, "s"),
    "adam~fisher_true": ("Adam's moment with true Fisher", ORANGE, "o"),
    "single_batch~fisher_true": ("one batch with true Fisher", _GREEN, "x"),
}
_CACHES = {
    "keep_one": "one layer\nfull, others\n2 bits",
    "keep_half": "half full,\nothers\n2 bits",
    "mixed": "3 bits on\naverage",
}
_CACHE_SIGNALS: Mapping[str, tuple[str, str, str]] = {
    "adam": ("Adam's moment of W_k, W_v", ORANGE, "o"),
    "adam_error": ("the same, times the error", _GREEN, "X"),
    "fisher_again": ("true Fisher, other labels", BLUE, "D"),
    "error": ("error alone", _GREY, "^"),
    "random": ("random", "#F0E442", "P"),
    "reverse": ("reverse", "#CC79A7", "v"),
}
_CHANGES = {
    "elements.adam~fisher_true.within": "weights: rank correlation with the true Fisher",
    "blocks.adam.within": "blocks: rank correlation with measured KL",
}


def plot_study(document: Mapping[str, Any], path: Path, *, dpi: int = DPI) -> None:
    """Draw six pictures into one PNG; raises InputError for a document without finished runs.

    Above: rank correlations over the training, of blocks with measured KL and of weights with the
    true Fisher, and what the variants change; below: what is decided, measured, of weights, floors
    and caches. Bars are 95 % intervals over runs, for variants the range over seeds.
    """
    summary = document["summary"]
    if not summary["by_step"]:
        raise InputError("the study has no finished run: there is nothing to draw")
    with picture(path, (16, 8), dpi) as figure:
        (blocks, weights, changes), (plans, floors, caches) = figure.subplots(2, 3)
        steps = summary["by_step"]
        for signal, style in _SIGNALS.items():
            _draw_course(blocks, steps, f"blocks.{signal}.within", style)
        for pair, style in _PAIRS.items():
            _draw_course(weights, steps, f"elements.{pair}.within", style)
        blocks.set_title("Blocks: rank correlation with measured KL, at one precision", fontsize=9)
        weights.set_title("Weights of a matrix: rank correlation", fontsize=9)
        for axes in (blocks, weights):
            axes.set_xlabel("training step")
            axes.grid(alpha=0.3)
        _draw_plans(plans, summary["final"])
        _draw_floors(floors, summary["final"])
        _draw_caches(caches, summary["final"])
        _draw_changes(changes, summary["variants"])
        blocks.set_ylim(top=1.03)
        blocks.legend(frameon=False, fontsize=7, ncols=2, loc=(0.02, 0.3))
        weights.legend(frameon=False, fontsize=7)
        plans.legend(frameon=False, fontsize=7, loc="upper left")
        floors.legend(frameon=False, fontsize=7, loc="lower left")
        caches.legend(frameon=False, fontsize=7, loc="upper left")


def _draw_course(
    axes: "Axes", steps: Mapping[str, Any], figure: str, style: tuple[str, str, str]
) -> None:
    known = [(int(step), row[figure]) for step, row in steps.items() if figure in row]
    if known:
        _draw_bars(axes, [step for step, _ in known], [row for _, row in known], style, line=True)


def _draw_plans(axes: "Axes", final: Mapping[str, Any]) -> None:
    budgets = sorted({_bits(name) for name in final if name.startswith("allocation.")})
    others = {signal: style for signal, style in _SIGNALS.items() if signal != "fisher_true"}
    paths = [f"allocation.{bits}.{{}}.over_true" for bits in budgets]
    _draw_groups(axes, final, paths, [f"{bits} bits" for bits in budgets], others)
    axes.axhline(1, color=BLUE, lw=0.8)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_title("KL of each signal's plan over the true Fisher's, equal bytes", fontsize=9)


def _draw_floors(axes: "Axes", final: Mapping[str, Any]) -> None:
    epsilons = sorted({_epsilon(name) for name in final if name.startswith("floors.")})
    shares = {name: _scaled(row, 1 / float(_epsilon(name))) for name, row in final.items()
              if name.startswith("floors.") and name.endswith(".kl")}  # fmt: skip
    paths = [f"floors.{epsilon}.{{}}.kl" for epsilon in epsilons]
    _draw_groups(axes, shares, paths, [f"\u03b5 = {epsilon}" for epsilon in epsilons], _SIGNALS)
    axes.axhline(1, color=INK, lw=0.8)
    axes.set_ylim(bottom=0)
    axes.set_title("KL over \u03b5 with every block at its floor, on other text", fontsize=9)


def _draw_caches(axes: "Axes", final: Mapping[str, Any]) -> None:
    paths = [f"caches.{name}.{{}}.over_true" for name in _CACHES]
    _draw_groups(axes, final, paths, list(_CACHES.values()), _CACHE_SIGNALS)
    axes.axhline(1, color=BLUE, lw=0.8)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylim(top=100)  # room for the legend
    axes.set_title("KL of each signal's cache over the true Fisher's, equal bytes", fontsize=9)


def _draw_groups(
    axes: "Axes",
    final: Mapping[str, Any],
    paths: Sequence[str],
    labels: Sequence[str],
    styles: Mapping[str, tuple[str, str, str]],
) -> None:
    """Draw a group of bars per path, whose {} is the signal; leaves out what was not measured."""
    for place, (signal, style) in enumerate(styles.items()):
        rows = [final.get(path.format(signal)) for path in paths]
        if all(rows):
            at = [index + (place - (len(styles) - 1) / 2) * 0.09 for index in range(len(paths))]
            _draw_bars(axes, at, rows, style, line=False)
    axes.set_xticks(range(len(paths)), labels, fontsize=8)
    axes.grid(alpha=0.3, axis="y")


def _draw_changes(axes: "Axes", variants: Mapping[str, Any]) -> None:
    names = [name for name, row in variants.items() if all(path in row for path in _CHANGES)]
    for offset, (path, label), style in zip(
        (-0.12, 0.12), _CHANGES.items(), ((BLUE, "D"), (ORANGE, "o")), strict=True
    ):
        rows = [variants[name][path] for name in names]
        means = [row["mean"] for row in rows]
        errors = [
            [mean - row["min"] for mean, row in zip(means, rows, strict=True)],
            [row["max"] - mean for mean, row in zip(means, rows, strict=True)],
        ]
        places = [index + offset for index in range(len(names))]
        axes.errorbar(
            means, places, xerr=errors, fmt=style[1], color=style[0], ms=4, lw=1, label=label
        )
    axes.axvline(0, color=INK, lw=0.8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_title("What one change does to Adam's correlations (bar: range of seeds)", fontsize=9)
    axes.grid(alpha=0.3, axis="x")
    if names:
        axes.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.07))


def _draw_bars(
    axes: "Axes",
    places: Sequence[float],
    rows: Sequence[Any],
    style: tuple[str, str, str],
    *,
    line: bool,
) -> None:
    label, color, marker = style
    means = [row["mean"] for row in rows]
    ends = [row["interval"] or (row["mean"], row["mean"]) for row in rows]
    errors = [
        [mean - low for mean, (low, _) in zip(means, ends, strict=True)],
        [high - mean for mean, (_, high) in zip(means, ends, strict=True)],
    ]
    axes.errorbar(
        places,
        means,
        yerr=errors,
        color=color,
        marker=marker,
        ms=4,
        lw=1.2,
        ls="-" if line else "",
        elinewidth=0.8,
        label=label,
    )


def _bits(name: str) -> str:
    return name.removeprefix("allocation.").rsplit(".", 2)[0]


def _epsilon(name: str) -> str:
    return name.removeprefix("floors.").rsplit(".", 2)[0]


def _scaled(row: Mapping[str, Any], factor: float) -> dict[str, Any]:
    interval = row["interval"] and [factor * end for end in row["interval"]]
    return {"mean": factor * row["mean"], "interval": interval}
