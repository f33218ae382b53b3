"""From importance to hints: ranks, and tiers from cumulative thresholds."""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from ..errors import InputError
from ..vocabulary import Tier
from .records import BlockHint, Hints, ModelInfo


def assign_tiers(
    num_bytes: Mapping[str, int],
    importance: Mapping[str, float | None],
    *,
    hbm_threshold: float,
    cpu_threshold: float,
) -> dict[str, Tier]:
    """Give each block the tier in which the middle of its bytes falls, blocks ordered by
    importance.

    The thresholds are cumulative fractions of all weight bytes: 0.3 and 0.8 give 30 % HBM, 50 % CPU
    and 20 % SSD, as near as whole blocks allow. Equal importance keeps the order of the mapping;
    blocks without a signal (None) come last.
    """
    total = sum(num_bytes.values())
    hbm_end, cpu_end = (
        Fraction(str(threshold)) * total for threshold in (hbm_threshold, cpu_threshold)
    )
    tiers: dict[str, Tier] = {}
    before = 0
    for name in rank_blocks(importance):
        middle = before + Fraction(num_bytes[name], 2)
        tiers[name] = Tier.HBM if middle < hbm_end else Tier.CPU if middle < cpu_end else Tier.SSD
        before += num_bytes[name]
    return {name: tiers[name] for name in num_bytes}


def rank_blocks(importance: Mapping[str, float | None]) -> list[str]:
    """Return block names, most important first; blocks without a signal last, ties in the order
    given.
    """
    return sorted(
        importance,
        key=lambda name: -math.inf if (value := importance[name]) is None else value,
        reverse=True,
    )


def build_hints(
    *,
    model: ModelInfo,
    provenance: Mapping[str, Any],
    num_bytes: Mapping[str, int],
    num_params: Mapping[str, int],
    density: Mapping[str, float | None],
    signals: Mapping[str, Mapping[str, float | Sequence[float]]],
    reasons: Mapping[str, str],
    hbm_threshold: float,
    cpu_threshold: float,
) -> Hints:
    """Make hints from a signal's density: mean signal per weight of each block, on any one scale,
    None where unknown.

    A density and not a sum, so that a block isn't important for being large; it is also the order
    that puts the most Fisher mass into a tier of given bytes (greedy knapsack). ``reasons`` go
    before the reason for the tier.
    """
    known = [value for value in density.values() if value is not None]
    for name, value in density.items():
        if value is not None and not 0 <= value < math.inf:
            raise InputError(
                f"block {name!r}: signal {value} must be finite and not negative: the training run "
                "diverged or is corrupt"
            )
    if not known:
        raise InputError(
            "no block has a signal: every parameter is frozen; collect Fisher information instead"
        )
    largest = max(known) or 1.0
    importance = {
        name: None if value is None else value / largest for name, value in density.items()
    }
    tiers = assign_tiers(
        num_bytes, importance, hbm_threshold=hbm_threshold, cpu_threshold=cpu_threshold
    )
    ranks = {name: rank for rank, name in enumerate(rank_blocks(importance), start=1)}
    blocks = {}
    for name, value in importance.items():
        place = (
            f"rank {ranks[name]} of {len(ranks)} by signal per weight"
            if value is not None
            else "ranked last: no signal"
        )
        blocks[name] = BlockHint(
            tier=tiers[name],
            importance=value,
            rank=None if value is None else ranks[name],
            num_bytes=num_bytes[name],
            num_params=num_params[name],
            signals=dict(signals.get(name, {})),
            reason="; ".join(filter(None, (reasons.get(name), f"{place} -> {tiers[name]}"))),
        )
    thresholds = {"hbm": hbm_threshold, "cpu": cpu_threshold}
    return Hints(model=model, provenance={**provenance, "thresholds": thresholds}, blocks=blocks)
