"""The picture of the study of quality bounds."""

from pathlib import Path
from typing import Any

LABELS = {
    "full": "full precision",
    "static K6V5": "K6V5 for all, no bound",
    "static K4V4": "K4V4 for all, no bound",
    "calibrated": "calibrated bound",
    "verified": "verified bound",
}
_COLORS = ("#444444", "#9ecae1", "#6baed6", "#e6550d", "#31a354")


def draw(document: dict[str, Any], path: Path) -> None:
    """Draw concurrency beside its identity, good answers per second, and the curve that says where
    memory buys speed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 3.9))
    points = document["points"]
    for (system, label), color in zip(LABELS.items(), _COLORS, strict=True):
        own = [point for point in points if point["system"] == system]
        rates = [point["p"] for point in own]
        left.plot(rates, [p["concurrency_ratio"] for p in own], "o-", color=color, label=label)
        middle.plot(rates, [p["goodput"] for p in own], "o-", color=color, label=label)
    full = [point for point in points if point["system"] == "full"]
    left.plot(
        [p["p"] for p in full], [p["identity"] for p in full], "k:", label="1/(c + (1 - c) p)"
    )
    left.set_ylabel("requests at a time, over full precision")
    middle.set_ylabel("answers within epsilon per second")
    for axis in (left, middle):
        axis.set_xlabel("share of requests that climb, p")
        axis.set_ylim(bottom=0)
    curve = document["curve"]
    right.plot(
        [p["concurrency"] for p in curve], [p["tokens_per_s"] for p in curve], "o-", color="#444444"
    )
    right.set_xscale("log", base=2)
    right.set_xticks([p["concurrency"] for p in curve], [str(p["concurrency"]) for p in curve])
    right.set_xlabel("requests decoded at a time, full precision")
    right.set_ylabel("tokens per second")
    right.set_ylim(bottom=0)
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
    left.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
