"""A plan that differs from another in where some blocks are: what single moves make of it."""

from dataclasses import replace

from ...vocabulary import Tier
from ..events import BlockFacts, Move
from ..plan import Placement, Plan
from ..states import placed_state
from ..timeline import Transfer, simulate
from .problem import Problem


def describe_blocks(problem: Problem) -> tuple[BlockFacts, ...]:
    """Return what the controller needs to know of the planner's blocks, in the order of needs."""
    places: dict[str, list[int]] = {name: [] for name in problem.needs}
    for place, use in enumerate(problem.uses):
        if not use.lookup:
            places[use.block].append(place)
    spec = problem.tiers[problem.below[-1][0]] if problem.below else None
    facts: dict[str, BlockFacts] = {}
    for group in problem.groups:
        for name in group.members:
            need = problem.needs[name]
            facts[name] = BlockFacts(
                name=name,
                resident_bytes=need.resident_bytes,
                stored_bytes=need.stored_bytes,
                unit_bytes=group.units,
                must_reside=need.must_reside,
                places=tuple(places[name]),
                transfer_seconds=group.link_seconds(spec) if spec is not None else 0.0,
                compute_seconds=need.compute_seconds,
                importance=need.importance or 0.0,
                lookup_bytes=need.lookup_bytes,
            )
    return tuple(facts[name] for name in problem.needs)


def move_blocks(problem: Problem, plan: Plan, move: Move) -> Plan:
    """Return the plan after a decision of the controller, with its predicted time."""
    placements = dict(plan.placements)
    for name, tier in (*move.demote, *((name, Tier.HBM) for name in move.promote)):
        placements[name] = _place(problem, placements[name], name, tier, move.reason)
    transfers = {
        name: Transfer(place.tier, place.unit_bytes, problem.needs[name].lookup_bytes)
        for name, place in placements.items()
        if place.tier is not Tier.HBM
    }
    return replace(
        plan,
        placements=placements,
        num_slots=move.num_slots,
        slot_bytes=move.slot_bytes,
        budget={**plan.budget, Tier.HBM: move.limit_bytes},
        predicted=simulate(problem.uses, transfers, problem.tiers, move.num_slots),
    )


def _place(problem: Problem, before: Placement, name: str, tier: Tier, reason: str) -> Placement:
    need, resident = problem.needs[name], tier is Tier.HBM
    group = next(each for each in problem.groups if name in each.members)
    only_looked_up = group.lookups and not group.full_uses
    return replace(
        before,
        tier=tier,
        state=placed_state(tier, need.precision, computed_as_is=need.computed_as_is),
        reason=reason,
        resident_bytes=need.resident_bytes if resident else 0,
        unit_bytes=() if resident or only_looked_up else group.units,
    )
