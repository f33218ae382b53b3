"""What the verbs that make hints share: the flags of the file, and the table of its tiers."""

from collections.abc import Mapping
from pathlib import Path

from ..hints import Hints
from ..units import format_bytes
from ..vocabulary import Tier
from .cli import output_file
from .flags import Flags


def add_tier_flags(out: Flags) -> None:
    """Add ``--output`` and the thresholds, for ``parse_thresholds``."""
    default = "(default: %(default)s)"
    out.add_argument(
        "--output",
        type=output_file,
        default=Path("tier_hints.json"),
        metavar="FILE",
        help=f"the hints {default}",
    )
    out.add_argument(
        "--hbm-threshold",
        default="0.3",
        metavar="SHARE",
        help=f"cumulative share of weight bytes at which HBM ends {default}",
    )
    out.add_argument(
        "--cpu-threshold",
        default="0.8",
        metavar="SHARE",
        help=f"cumulative share of weight bytes at which CPU ends, SSD is the rest {default}",
    )


def summarize_tiers(hints: Hints, mass: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Return tier -> number of blocks, bytes, and its share of the signal's mass (by block)."""
    used = {hint.tier for hint in hints.blocks.values()}
    tiers: dict[str, dict[str, float]] = {
        str(tier): {"blocks": 0, "bytes": 0, "share": 0.0} for tier in Tier if tier in used
    }
    for name, hint in hints.blocks.items():
        entry = tiers[str(hint.tier)]
        entry["blocks"] += 1
        entry["bytes"] += hint.num_bytes or 0
        entry["share"] += mass[name]
    total = sum(entry["share"] for entry in tiers.values()) or 1.0
    for entry in tiers.values():
        entry["share"] = round(entry["share"] / total, 6)
    return tiers


def tier_table(hints: Hints, tiers: dict[str, dict[str, float]], signal: str) -> str:
    """Return the table of ``summarize_tiers``, and the blocks at both ends; ``signal`` heads it."""
    width = max(21, len(signal) + 3)
    lines = [f"{'tier':<6}{'blocks':>8}{'weights':>14}{signal:>{width}}"]
    for tier, entry in tiers.items():
        size = format_bytes(entry["bytes"])
        lines.append(f"{tier:<6}{entry['blocks']:>8}{size:>14}{entry['share']:>{width - 1}.1%} ")
    ranked = sorted(hints.blocks.items(), key=lambda item: item[1].rank or len(hints.blocks))
    lines += ["", "most important per weight: " + ", ".join(name for name, _ in ranked[:3])]
    lines += ["least important per weight: " + ", ".join(name for name, _ in ranked[-3:])]
    return "\n".join(lines)
