"""Improving a placement by small exchanges between fast memory and the tiers below.

Where compute hides most of the transfers, seconds of the link are not all that counts: how streamed
blocks lie in the schedule does too, and that is found by trying.
"""

import math
from collections.abc import Iterator, Mapping
from itertools import combinations, product

from ...vocabulary import Tier
from .problem import Problem

_SIZES = ((1, 1), (1, 0), (0, 1), (1, 2), (2, 1))
"""Blocks that go up and down in one exchange; fewer resident blocks may be better spread."""


def exchanges(
    problem: Problem, tiers: Mapping[str, Tier], slot_bytes: int, space: int
) -> Iterator[dict[str, Tier]]:
    """Yield the placements one exchange away that fit, small exchanges first.

    ``space``: bytes of fast memory that are free; blocks that go down must fit ``slot_bytes``.
    """
    needs = problem.needs
    room: dict[Tier, float] = {
        tier: math.inf if size is None else size for tier, size in problem.below
    }
    streamed, movable = [], []
    for index, group in enumerate(problem.groups):
        for name in group.members:
            if tiers[name] is not Tier.HBM:
                room[tiers[name]] -= needs[name].stored_bytes
                if not problem.is_cached(needs[name]):
                    streamed.append(name)
            elif problem.slot_needs[index] <= slot_bytes:
                movable.append(name)
    for num_up, num_down in _SIZES:
        pairs = product(combinations(streamed, num_up), combinations(movable, num_down))
        for ups, downs in pairs:
            freed = sum(needs[name].resident_bytes for name in downs)
            if sum(needs[name].resident_bytes for name in ups) > space + freed:
                continue
            going_down = sum(needs[name].stored_bytes for name in downs)
            for tier in {tiers[name]: None for name in ups} or room:
                left = sum(needs[name].stored_bytes for name in ups if tiers[name] is tier)
                if going_down <= room[tier] + left:
                    yield {**tiers, **dict.fromkeys(ups, Tier.HBM), **dict.fromkeys(downs, tier)}
