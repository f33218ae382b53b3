"""Placing blocks without a budget: each goes to the tier that its hints name.

Hints say what should be near, not how much fits, so nothing is predicted of such a plan.
"""

from collections.abc import Mapping, Sequence

from ...vocabulary import Tier
from ..plan import BlockNeed, Placement, Plan
from ..states import placed_state
from ..timeline import PassTime
from .problem import least_cache


def place_by_hints(
    needs: Sequence[BlockNeed],
    hinted_bytes: Mapping[str, Mapping[Tier, int]],
    *,
    scratch_bytes: int,
) -> Plan:
    """Put every block where most of its bytes should be, the farther tier where it is a tie.

    ``hinted_bytes``: by block, the bytes for which hints name each tier; a block of several may
    have several. What computes around other blocks stays in fast memory. There is one slot, and two
    where they cost less than half of what leaving saves. Where an expert of a layer is to be below
    all of them are, and come into a cache that has the room that the hints give to experts.
    """
    placements = {need.name: _place(need, hinted_bytes[need.name]) for need in needs}
    cache_bytes = _cache(needs, placements)
    units = [size for placement in placements.values() for size in placement.unit_bytes]
    saved = sum(need.resident_bytes for need in needs if placements[need.name].tier is not Tier.HBM)
    slot_bytes = max(units, default=0)
    return Plan(
        placements=placements,
        slot_bytes=slot_bytes,
        num_slots=0 if not units else 2 if len(units) > 1 and 4 * slot_bytes < saved else 1,
        scratch_bytes=scratch_bytes,
        cache_bytes=cache_bytes,
        budget={},
        predicted=PassTime(0.0, 0.0, 0.0, 0),
    )


def _cache(needs: Sequence[BlockNeed], placements: dict[str, Placement]) -> int:
    """Send the experts that have others below after them; returns the bytes of their cache."""
    layers: dict[str, list[BlockNeed]] = {}
    for need in needs:
        if need.routed:
            layers.setdefault(need.name.rpartition(".")[0], []).append(need)
    cached: list[BlockNeed] = []
    spare = 0
    for experts in layers.values():
        below = [tier for need in experts if (tier := placements[need.name].tier) is not Tier.HBM]
        if not below:
            continue
        cached += experts
        for need in experts:
            if placements[need.name].tier is Tier.HBM:
                spare += need.unit
                placements[need.name] = _below(need, max(below, key=list(Tier).index))
    return max(spare, least_cache(cached))


def _place(need: BlockNeed, hinted_bytes: Mapping[Tier, int]) -> Placement:
    order = list(Tier)
    tier = max(hinted_bytes, key=lambda tier: (hinted_bytes[tier], order.index(tier)))
    reason = "the hints' tier"
    if need.must_reside and tier is not Tier.HBM:
        tier, reason = Tier.HBM, "other blocks compute inside it"
    if tier is not Tier.HBM:
        return _below(need, tier)
    return Placement(
        tier=tier,
        precision=need.precision,
        state=placed_state(tier, need.precision, computed_as_is=need.computed_as_is),
        reason=reason,
        resident_bytes=need.resident_bytes,
        stored_bytes=need.stored_bytes,
    )


def _below(need: BlockNeed, tier: Tier) -> Placement:
    return Placement(
        tier=tier,
        precision=need.precision,
        state=placed_state(tier, need.precision, computed_as_is=need.computed_as_is),
        reason="the hints' tier",
        resident_bytes=0,
        stored_bytes=need.stored_bytes,
        unit_bytes=() if need.routed else need.unit_bytes,
    )
