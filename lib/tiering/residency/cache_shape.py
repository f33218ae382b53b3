"""What a cache of experts is made of: their sizes and what a token takes, from layers and a plan's
bytes.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...policy.experts import ExpertCache
from ...units import format_bytes
from .listed import ListedExperts
from .packed import PackedExperts


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheShape:
    """By layer the bytes of each expert and how many a token takes; uses to start from."""

    sizes: dict[int, list[int]]
    per_token: dict[int, int]
    counts: dict[tuple[int, int], float]
    aside_bytes: int
    """What is no cache's: one or two of the largest experts pass through it."""
    passes_two: bool


def shape_cache(
    layers: Sequence[PackedExperts | ListedExperts],
    router_counts: Mapping[str, float],
    num_bytes: int,
) -> CacheShape | None:
    """Return the shape of a cache in so many bytes; None where no layer has experts below."""
    below = {
        number: layer
        for number, layer in enumerate(layers)
        if any(each.units for each in layer.experts)
    }
    if not below:
        return None
    sizes = {
        number: [each.units[0].num_bytes for each in layer.experts]
        for number, layer in below.items()
    }
    per_token = {number: layer.routed for number, layer in below.items()}
    largest = max(max(each) for each in sizes.values())
    needed = max(
        sum(sorted(each, reverse=True)[: per_token[number]]) for number, each in sizes.items()
    )
    passes_two = needed + 2 * largest <= num_bytes
    return CacheShape(
        sizes=sizes,
        per_token=per_token,
        counts={
            (number, each.number): router_counts[each.name]
            for number, layer in below.items()
            for each in layer.experts
            if each.name in router_counts
        },
        aside_bytes=(2 if passes_two else 1) * largest,
        passes_two=passes_two,
    )


def warn_below_cycle(cache: ExpertCache) -> None:
    """Say that a cache holds less than one token uses."""
    warnings.warn(
        f"{format_bytes(cache.capacity_bytes)} for experts is less than a token uses, "
        f"{format_bytes(cache.cycle_bytes)}: most are read for every token; give that much more "
        "HBM, or fewer bits",
        RuntimeWarning,
        stacklevel=3,
    )
