"""From one plan to the next, block by block, so that no tier passes its budget on the way.

While a block moves it is in both tiers: what it leaves is free again only once it has arrived. A
block whose precision changes is let go of first and made again from its original, which neither
plan counts. Slots are freed before anything moves and made again at the end. What has to leave
fast memory comes first; otherwise whatever fits moves next, until all have.
"""

import random
from collections.abc import Iterator, Mapping

from ..vocabulary import Tier
from .plan import Placement, Plan

_SHUFFLES = 20
"""Random orders that are tried where the others got stuck."""


class NoRoom(Exception):
    """No order of moves was found that keeps the budgets: the block that can't come, and what that
    would take.
    """

    def __init__(self, block: str, tier: Tier, num_bytes: int, limit: int) -> None:
        super().__init__(block)
        self.block, self.tier, self.num_bytes, self.limit = block, tier, num_bytes, limit


def order_moves(before: Plan | None, after: Plan) -> tuple[str, ...]:
    """Return the blocks that move, in an order that keeps the budgets of ``after``.

    What leaves fast memory goes first if it can, then whatever has room; where that gets stuck
    other priorities are tried. It is a search, and may miss an order that exists.

    ``before`` is what is held now; None: nothing yet. A tier that is above its new budget to begin
    with gets nothing until it is below. Raises NoRoom where no such order was found.
    """
    held = _kept(before, after)
    waiting = [
        name
        for name, place in after.placements.items()
        if name not in held or held[name].tier is not place.tier
    ]
    waiting.sort(key=lambda name: after.placements[name].tier is Tier.HBM)
    first: NoRoom | None = None
    for priorities in _priorities(waiting, after):
        try:
            return _order(priorities, held, before, after)
        except NoRoom as stuck:
            first = first or stuck
    assert first is not None
    raise first


def _priorities(waiting: list[str], after: Plan) -> Iterator[list[str]]:
    """Yield orders of preference, the usual one first."""

    def size(name: str) -> int:
        return after.placements[name].held_bytes

    yield waiting
    yield sorted(waiting, key=size)
    yield sorted(waiting, key=size, reverse=True)
    yield waiting[::-1]
    generator = random.Random(0)
    for _ in range(_SHUFFLES if len(waiting) > 2 else 0):
        yield generator.sample(waiting, len(waiting))


def _order(
    waiting: list[str], held: Mapping[str, Placement], before: Plan | None, after: Plan
) -> tuple[str, ...]:
    """Move whatever has room, in this order of preference, until all have moved."""
    used = dict.fromkeys(Tier, 0)
    used[Tier.HBM] = after.scratch_bytes
    used[Tier.SSD] = max(after.original_bytes, before.original_bytes if before else 0)
    for place in held.values():
        used[place.tier] += place.held_bytes
    order: list[str] = []
    while waiting:
        stuck = []
        for name in waiting:
            place = after.placements[name]
            limit = after.limit(place.tier)
            if limit is not None and used[place.tier] + place.held_bytes > limit:
                stuck.append(name)
                continue
            used[place.tier] += place.held_bytes
            if name in held:
                used[held[name].tier] -= held[name].held_bytes
            order.append(name)
        if len(stuck) == len(waiting):
            place = after.placements[stuck[0]]
            limit = after.limit(place.tier)
            assert limit is not None
            raise NoRoom(stuck[0], place.tier, used[place.tier] + place.held_bytes, limit)
        waiting = stuck
    return tuple(order)


def _kept(before: Plan | None, after: Plan) -> Mapping[str, Placement]:
    """Return what is held of the blocks that needn't be made again."""
    if before is None:
        return {}
    return {
        name: place
        for name, place in before.placements.items()
        if place.precision is after.placements[name].precision
    }
