"""The picture of an offload benchmark: tokens per second and memory against the limit.

The document is that of scripts/experiments/offload/bench_offload.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .drawing import BLUE, DPI, INK, ORANGE, SKY_BLUE, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GREY = "#888888"
_STYLES: Mapping[str, tuple[str, str]] = {
    "ours-lossless": (ORANGE, "o"),
    "ours-int8": (BLUE, "s"),
    "ours-int4": ("#009E73", "D"),
    "transformers": (INK, "v"),
    "accelerate": (_GREY, "^"),
    "airllm": ("#CC79A7", "P"),
    "diffusers-block": (INK, "v"),
    "diffusers-leaf": ("#CC79A7", "<"),
    "flextensor": ("#F0E442", "P"),
}
"""Colour and marker of each system; a system that is not named here is sky blue."""
_HEADROOM = 1.6
"""Room above and below what is drawn on the log axis, as a factor."""


def plot_offload(document: Mapping[str, Any], path: Path, *, dpi: int = DPI) -> None:
    """Draw one line per system, and write a PNG; raises InputError where no limited run survived.

    Left: median tokens/s (log axis), the range down to the slow tail as a bar, runs that did not
    survive as crosses below. Right: peak memory, filled without and hollow with the page cache; of
    a GPU filled what was reserved there, hollow what was pinned in host memory for it.
    """
    limited: dict[str, list[Mapping[str, Any]]] = {}
    for run in document["runs"]:
        if run["limit_mib"] is not None:
            limited.setdefault(run["name"], []).append(run)
    rates = [
        run["tokens_per_s"]["median"]
        for run in document["runs"]
        if run["survived"] and run["tokens_per_s"]["median"]
    ]
    if not rates or not limited:
        raise InputError("no run under a memory limit survived: there is nothing to draw")
    bottom = min(rates) / _HEADROOM**2
    on_gpu = any("pinned_mib" in run for run in document["runs"])
    limit_name = "GPU memory limit (MiB)" if on_gpu else "memory limit (MiB)"
    with picture(path, (10, 4.6), dpi) as figure:
        speed, memory = figure.subplots(1, 2, width_ratios=(3, 2))
        for name, runs in limited.items():
            if all(run["peak_mib"] is None for run in runs):
                continue  # it was not run at all
            color, marker = _STYLES.get(name, (SKY_BLUE, "o"))
            ordered = sorted(runs, key=lambda run: run["limit_mib"])
            _draw_speed(speed, ordered, color=color, marker=marker, bottom=bottom)
            _draw_memory(memory, ordered, color=color, marker=marker, on_gpu=on_gpu)
        _draw_resident(speed, document)
        limits = sorted({run["limit_mib"] for runs in limited.values() for run in runs})
        memory.plot(limits, limits, color=INK, lw=0.8, ls=":", zorder=0)
        for axes in (speed, memory):
            axes.set_xticks(limits, [str(limit) for limit in limits], fontsize=8)
            axes.margins(x=0.08)
            axes.set_xlabel(limit_name)
            axes.grid(alpha=0.3)
        speed.set_xlabel(f"{limit_name}; crosses: did not survive")
        speed.set_yscale("log")
        speed.set_ylim(bottom / _HEADROOM, max(rates) * _HEADROOM)
        speed.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        speed.set_ylabel("tokens per second, median\n(bar: 95 % of tokens are faster)")
        figure.legend(
            *speed.get_legend_handles_labels(),
            frameon=False,
            fontsize=8,
            loc="outside upper center",
            ncols=4,
        )
        memory.set_ylim(bottom=0)
        kinds = (
            "filled: of the GPU, hollow: pinned on the host"
            if on_gpu
            else "filled: anonymous, hollow: with page cache"
        )
        memory.set_ylabel(f"peak MiB (dotted: the limit)\n{kinds}")


def _draw_speed(
    axes: "Axes", runs: list[Mapping[str, Any]], *, color: str, marker: str, bottom: float
) -> None:
    alive = [run for run in runs if run["survived"]]
    dead = [run["limit_mib"] for run in runs if not run["survived"]]
    medians = [run["tokens_per_s"]["median"] for run in alive]
    slow = [median - run["tokens_per_s"]["p95"] for median, run in zip(medians, alive, strict=True)]
    axes.errorbar(
        [run["limit_mib"] for run in alive],
        medians,
        yerr=[slow, [0.0] * len(slow)],
        color=color,
        marker=marker,
        ms=5,
        lw=1.4,
        capsize=2,
        label=runs[0]["label"],
    )
    axes.plot(dead, [bottom] * len(dead), color=color, marker="x", ms=7, mew=2, ls="")


def _draw_memory(
    axes: "Axes", runs: list[Mapping[str, Any]], *, color: str, marker: str, on_gpu: bool
) -> None:
    limits = [run["limit_mib"] for run in runs]
    filled, hollow = ("peak_mib", "pinned_mib") if on_gpu else ("peak_anon_mib", "peak_mib")
    for key, fill in ((filled, "full"), (hollow, "none")):
        peaks = [run.get(key) for run in runs]
        axes.plot(
            limits,
            [float("nan") if peak is None else peak for peak in peaks],
            color=color,
            marker=marker,
            ms=5,
            lw=1.2 if fill == "full" else 0.5,
            fillstyle=fill,
        )


def _draw_resident(axes: "Axes", document: Mapping[str, Any]) -> None:
    for run in document["runs"]:
        if run["name"] == "resident" and run["survived"]:
            rate = run["tokens_per_s"]["median"]
            peak = run["peak_mib"] if run["peak_anon_mib"] is None else run["peak_anon_mib"]
            label = f"{run['label']}, no limit ({peak:.0f} MiB)"
            axes.axhline(rate, color=INK, ls="--", lw=1, label=label)
