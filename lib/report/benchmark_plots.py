"""Pictures of benchmark documents: where the time of a forward pass goes, and resident weights.

Every function writes one PNG file in one step and raises InputError where there is nothing to draw.
"""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError
from ..units import MIB
from ..vocabulary import Tier
from .drawing import BLUE, DPI, INK, SKY_BLUE, TIER_COLORS, TIER_HATCHES, picture
from .tables import Document, format_ms, name_clock, tier_rows

_BASELINE_COLOR, _COMPUTE_COLOR = "#555555", "#AAAAAA"
_ON_ITS_WAY: dict[str, Any] = {"facecolor": SKY_BLUE, "edgecolor": INK, "lw": 0.3, "hatch": "////"}
_IN_A_SLOT: dict[str, Any] = {"facecolor": TIER_COLORS[Tier.HBM], "edgecolor": INK, "lw": 0.3}
_MOST_ROWS = 80


class Share(NamedTuple):
    """A part of a forward pass's time."""

    name: str
    milliseconds: float
    color: str
    hatch: str = ""


def plot_latency(documents: Sequence[Document], path: Path, *, dpi: int = DPI) -> None:
    """Draw the mean forward pass of each run as compute, transfer per tier and the rest."""
    bars: list[tuple[str, Document, list[Share]]] = []
    for document in documents:
        mode, baseline = document["mode"], document["baseline"]
        if baseline:
            whole = Share("untouched model", baseline["latency_ms"]["mean"], _BASELINE_COLOR)
            bars.append((f"baseline of the\n{mode} run (measured)", baseline, [whole]))
        label = f"tiered, {mode}\n({name_clock(document)})"
        bars.append((label, document["tiered"], latency_shares(document)))
    if not bars:
        raise InputError("no benchmark was run: there is no latency to draw")
    with picture(path, (9, 1.4 + 0.75 * len(bars)), dpi) as figure:
        axes = figure.add_subplot()
        shown: dict[str, Any] = {}
        end = 0.0
        for y, (_, part, shares) in enumerate(bars):
            start = 0.0
            for name, width, color, hatch in shares:
                style: dict[str, Any] = {
                    "color": color,
                    "hatch": hatch,
                    "edgecolor": INK,
                    "lw": 0.4,
                }
                shown.setdefault(name, axes.barh(y, width, left=start, height=0.55, **style))
                start += width
            latency = part["latency_ms"]
            axes.plot([latency["p95"]] * 2, [y - 0.36, y + 0.36], color=INK, lw=1.5)
            text = f"mean {format_ms(latency['mean'])}, p95 {format_ms(latency['p95'])}"
            right = max(start, latency["p95"])
            axes.annotate(
                text, (right, y), (6, 0), textcoords="offset points", va="center", fontsize=8
            )
            end = max(end, right)
        axes.set_yticks(range(len(bars)), [label for label, _, _ in bars])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.4 * end)
        axes.set_xlabel("milliseconds per forward pass (black line: 95th percentile)")
        above: dict[str, Any] = {
            "loc": "lower left",
            "bbox_to_anchor": (0, 1),
            "ncols": 3,
        }
        axes.legend(list(shown.values()), list(shown), frameon=False, fontsize=8, **above)


def plot_memory(documents: Sequence[Document], path: Path, *, dpi: int = DPI) -> None:
    """Draw the weight bytes in fast memory over a few forward passes, a panel for each run."""
    if not documents:
        raise InputError("no benchmark was run: there is no memory to draw")
    with picture(path, (9, 0.4 + 2.5 * len(documents)), dpi) as figure:
        panels = figure.subplots(len(documents), 1, squeeze=False)[:, 0]
        for axes, document in zip(panels, documents, strict=True):
            times, resident = _timeline(document)
            baseline = document["weight_bytes"] / MIB
            axes.fill_between(times, resident, step="post", color=BLUE, alpha=0.25)
            label = f"tiered: weights resident, peak {max(resident):.1f} MiB"
            axes.step(times, resident, where="post", color=BLUE, lw=1.2, label=label)
            label = f"baseline: all weights, {baseline:.1f} MiB"
            axes.axhline(baseline, color=INK, ls="--", lw=1, label=label)
            axes.set_ylim(0, 1.35 * baseline)
            axes.set_xlim(0, times[-1])
            axes.set_ylabel("MiB in fast memory")
            axes.set_xlabel("milliseconds since the first timed forward pass")
            real = document["mode"] == "real"
            title = "real (measured)" if real else "emulated: nothing moves, all weights stay"
            axes.set_title(title, fontsize=9, loc="left")
            axes.legend(frameon=False, fontsize=8, loc="upper right", ncols=2)
            axes.grid(alpha=0.3)


def plot_stays(documents: Sequence[Document], path: Path, *, dpi: int = DPI) -> None:
    """Draw when each block was on its way and in a slot during the last passes of a real run, a row
    for each block.
    """
    runs = [each for each in documents if (each["tiered"].get("in_slots") or {}).get("stays")]
    if not runs:
        raise InputError(
            "no block came into a slot in real mode: all weights stayed where they are"
        )
    document = runs[0]
    window = document["tiered"]["in_slots"]
    rows = list(window["stays"].items())[:_MOST_ROWS]
    scale, ends = 1e3, list(accumulate(window["pass_seconds"]))
    end = ends[-1]
    with picture(path, (10, 1.3 + 0.17 * max(len(rows), 6)), dpi) as figure:
        axes = figure.add_subplot()
        for y, (_, stays) in enumerate(rows):
            coming, there = [], []
            for asked, arrived, left in stays:
                left = end if left is None else left
                coming.append((scale * asked, scale * (arrived - asked)))
                there.append((scale * arrived, scale * max(left - arrived, 0.0)))
            axes.broken_barh(coming, (y - 0.4, 0.8), **_ON_ITS_WAY)
            axes.broken_barh(there, (y - 0.4, 0.8), **_IN_A_SLOT)
        for each in ends[:-1]:
            axes.axvline(scale * each, color=INK, lw=0.8, ls=":")
        axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=7)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(0, scale * end)
        resident = document["num_blocks"] - len(window["stays"])
        more = len(window["stays"]) - len(rows)
        text = f"milliseconds; {resident} other blocks did not move"
        axes.set_xlabel(text + (f"; {more} more moved" if more else ""))
        handles = [axes.barh(0, 0, **_ON_ITS_WAY), axes.barh(0, 0, **_IN_A_SLOT)]
        above: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 2}
        axes.legend(handles, ["on its way (S6)", "in a slot (S1 or S3)"], frameon=False, **above)


def latency_shares(document: Document) -> list[Share]:
    """Split a tiered run's mean latency into transfer from each tier, and compute: the rest, since
    what resides in fast memory has no hooks that would time it.
    """
    shares = []
    for row in tier_rows(document):
        if row.transfer_ms:
            tier = Tier(row.tier)
            name = f"transfer from {tier}"
            shares.append(Share(name, row.transfer_ms, TIER_COLORS[tier], TIER_HATCHES[tier]))
    compute = document["tiered"]["latency_ms"]["mean"] - sum(share.milliseconds for share in shares)
    return [Share("compute", max(compute, 0.0), _COMPUTE_COLOR), *shares]


def _timeline(document: Document) -> tuple[list[float], list[float]]:
    """Return milliseconds and MiB; a flat line of one pass where nothing ever changed."""
    stats = document["tiered"]["stats"]
    points = [(seconds * 1e3, num_bytes / MIB) for seconds, num_bytes in stats["timeline"]]
    if len(points) < 2:
        return [0.0, document["tiered"]["latency_ms"]["mean"]], [stats["resident_bytes"] / MIB] * 2
    times, resident = zip(*points, strict=True)
    return list(times), list(resident)
