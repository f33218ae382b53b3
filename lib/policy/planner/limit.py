"""The physical limit of streaming: what no plan and no runtime can beat within a budget."""

from collections.abc import Iterable

from ...machine import MachineProfile
from ...units import GB
from ...vocabulary import Tier
from ..plan import BlockNeed, Plan


def limit_seconds(needs: Iterable[BlockNeed], plan: Plan, machine: MachineProfile) -> float:
    """Return the least seconds of a pass: all bytes that don't fit cross their links once, without
    setup, slots or gaps, the fastest tier filled first; or the compute, if longer.
    """
    streamable = [need for need in needs if not (need.lookup_bytes and need.uses == 1)]
    fast = plan.budget[Tier.HBM]
    left = 0
    if fast is not None:
        left = max(sum(need.stored_bytes for need in streamable) - fast, 0)
    seconds = plan.predicted.compute_seconds
    below = sorted(
        (tier for tier in plan.budget if tier is not Tier.HBM),
        key=lambda tier: -machine.tiers[tier].bandwidth_gb_s,
    )
    for tier in below:
        limit = plan.budget[tier]
        share = left if limit is None else min(left, limit)
        seconds = max(seconds, share / (machine.tiers[tier].bandwidth_gb_s * GB))
        left -= share
    return seconds
