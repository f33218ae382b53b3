"""Placing blocks: which stay in fast memory, which are streamed from where, through which slots.

A dense pass uses every block once, in the same order each time. For such a cycle a fixed resident
set is the best cache (LRU would evict each block just before its use), and what a resident byte
saves is time of a link: setup + bytes / bandwidth of each transfer that it makes unnecessary.
``search`` weighs the choices; here are the budget, the plan and the words for it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ...errors import InputError
from ...machine import MachineProfile
from ...units import KIB, MIB, format_bytes, format_seconds
from ...vocabulary import Tier
from ..plan import BlockNeed, Placement, Plan, Step
from ..states import placed_state
from .problem import NOWHERE, Problem, SlotLayout, least, most_cached
from .search import Choice, Search


def make_plan(
    needs: Sequence[BlockNeed],
    schedule: Sequence[str | Step],
    budget: Mapping[Tier, int | None],
    machine: MachineProfile,
    scratch_bytes: int,
) -> Plan:
    """Place every block so that a pass takes the least time within the budget.

    ``schedule`` names blocks in order of use (see ``Problem``). ``budget``: bytes per tier, None
    for no limit but the machine's capacity; a tier that it doesn't name isn't used.
    ``scratch_bytes`` of fast memory are spent already. Raises InputError where no plan fits, with
    the smallest HBM budget that would do and what takes it.
    """
    if Tier.HBM not in budget:
        raise InputError("the budget lacks HBM, the memory of the compute device: give HBM=SIZE")
    fast = least(budget[Tier.HBM], machine.capacity_bytes.get(Tier.HBM))
    everything = scratch_bytes + sum(need.resident_bytes for need in needs)
    if fast is None:
        fast = everything
    caches = everything > fast and len(budget) > 1
    if caches:
        needs, schedule = _expect_misses(needs, schedule, fast - everything)
    problem = Problem(needs, schedule, budget, machine, scratch_bytes, caches=caches)
    layouts = [layout for layout in problem.layouts if layout.smallest_bytes <= fast]
    if everything <= fast:
        # A block that would stay in a slot of its own is predicted to be as fast as a resident one.
        layouts = [layout for layout in layouts if not layout.num_slots]
    if not layouts:
        raise InputError(_explain_infeasible(problem, fast))
    choice = Search(problem, fast).best(layouts)
    spare = fast - problem.taken_bytes - choice.fast_bytes
    return Plan(
        placements=_placements(problem, choice),
        slot_bytes=choice.layout.slot_bytes,
        num_slots=choice.layout.num_slots,
        scratch_bytes=scratch_bytes,
        cache_bytes=min(problem.cache_bytes + spare, most_cached(needs)) if caches else 0,
        budget=dict(budget),
        predicted=choice.predicted,
    )


def smallest_budget(
    needs: Sequence[BlockNeed],
    schedule: Sequence[str | Step],
    budget: Mapping[Tier, int | None],
    machine: MachineProfile,
    scratch_bytes: int,
) -> int:
    """Return the smallest HBM bytes for which ``make_plan`` finds a plan; HBM's own entry is not
    looked at.
    """
    problem = Problem(needs, schedule, budget, machine, scratch_bytes, caches=len(budget) > 1)
    everything = scratch_bytes + sum(need.resident_bytes for need in needs)
    return min(everything, *(layout.smallest_bytes for layout in problem.layouts))


def _expect_misses(
    needs: Sequence[BlockNeed], schedule: Sequence[str | Step], spare: int
) -> tuple[list[BlockNeed], list[str | Step]]:
    """Return needs and schedule with as many experts of each layer looked up as a token is expected
    to miss: of those routed to, the share that a cache doesn't hold. ``spare`` is negative, what
    all blocks take beyond the budget.
    """
    total = sum(need.stored_bytes for need in needs if need.routed)
    share = min(-spare / total, 1.0) if total else 1.0
    layers: dict[str, list[BlockNeed]] = {}
    for need in needs:
        if need.routed:
            layers.setdefault(need.name.rpartition(".")[0], []).append(need)
    changed = {need.name: need for need in needs}
    missed: set[str] = set()
    for experts in layers.values():
        misses = experts[0].routed * share
        count = max(math.ceil(misses), 1)
        seconds = sum(need.compute_seconds for need in experts) / count
        for need in experts[:count]:
            moved = max(int(need.unit * misses / count), 1)
            changed[need.name] = replace(need, lookup_bytes=moved, compute_seconds=seconds)
            missed.add(need.name)
    steps = [
        entry
        for entry in schedule
        if (name := entry if isinstance(entry, str) else entry.block) in missed
        or name not in changed
        or not changed[name].routed
    ]
    return list(changed.values()), steps


def _placements(problem: Problem, choice: Choice) -> dict[str, Placement]:
    """Write a choice down, in the order of the needs."""
    placements: dict[str, Placement] = {}
    for index, group in enumerate(problem.groups):
        streamed_units = () if group.lookups and not group.full_uses else group.units
        reasons = {
            tier: _reason(problem, choice.layout, index, tier)
            for tier in {choice.tiers[name] for name in group.members}
        }
        for name in group.members:
            need, tier = problem.needs[name], choice.tiers[name]
            resident = tier is Tier.HBM
            placements[name] = Placement(
                tier=tier,
                precision=need.precision,
                state=placed_state(tier, need.precision, computed_as_is=need.computed_as_is),
                reason=reasons[tier],
                resident_bytes=need.resident_bytes if resident else 0,
                stored_bytes=need.stored_bytes,
                unit_bytes=() if resident else streamed_units,
            )
    return {name: placements[name] for name in problem.needs}


def _reason(problem: Problem, layout: SlotLayout, index: int, tier: Tier) -> str:
    group = problem.groups[index]
    if tier is not Tier.HBM:
        seconds = group.link_seconds(problem.tiers[tier])
        if problem.is_cached(group.need):
            return f"an expert: read from {tier} when it is routed to, unless it is cached"
        if not group.full_uses and group.lookups:
            return f"only looked up: {format_seconds(seconds)} per pass from {tier}"
        if not seconds:
            return f"not used in a pass: kept in {tier}"
        return f"streamed from {tier}: {format_seconds(seconds)} of its link per pass"
    if group.need.must_reside:
        return "must be resident"
    if not problem.below:
        return "resident: the budget names no tier below"
    if not layout.num_slots:
        return "resident: nothing is streamed"
    if index in layout.forced:
        return f"resident: too large for slots of {format_bytes(layout.slot_bytes)}"
    last = problem.below[-1][0]
    seconds = group.link_seconds(problem.tiers[last])
    return f"resident: saves {format_seconds(seconds)} of {last} per pass"


def _explain_infeasible(problem: Problem, fast: int) -> str:
    """Name the smallest budget that works, and what takes it."""
    layout = min(problem.layouts, key=lambda layout: layout.smallest_bytes)
    parts: list[tuple[int, str]] = []
    if layout.smallest_bytes >= NOWHERE:
        size = sum(need.stored_bytes for need in problem.needs.values() if need.routed)
        return (
            f"the tiers below HBM don't hold the model's experts, {format_bytes(size)}: give one "
            "of them a larger budget, or no limit, such as SSD="
        )
    if problem.cache_bytes:
        size = problem.cache_bytes
        parts.append((size, f"{format_bytes(size)} for the experts of a layer that a token takes"))
    if layout.slot_bytes:
        size = layout.num_slots * layout.slot_bytes
        parts.append((size, f"{format_bytes(size)} for a slot to stream through"))
    if problem.scratch_bytes:
        parts.append((problem.scratch_bytes, f"{format_bytes(problem.scratch_bytes)} of scratch"))
    for index, group in enumerate(problem.groups):
        count = group.count - sum(counts[index] for counts in layout.kept)
        if index in layout.forced or (layout.kept and count):
            size = group.need.resident_bytes * count
            name = group.members[0]
            text = repr(name) if count == 1 else f"{count} blocks such as {name!r}"
            parts.append((size, f"{format_bytes(size)} for {text}, resident"))
    parts.sort(key=lambda part: -part[0])
    takers = "; ".join(text for _, text in parts[:4]) + ("; ..." if len(parts) > 4 else "")
    return (
        f"budget HBM={_size_text(fast)} is too small: the smallest that works is "
        f"HBM={_size_text(layout.smallest_bytes)} ({takers})"
        + ("" if problem.below else "; or name a tier below, such as SSD=")
    )


def _size_text(num_bytes: int) -> str:
    """Print a size that can be given as a budget, rounded up to whole MiB, or KiB if small."""
    for unit, name in ((MIB, "MiB"), (KIB, "KiB")):
        if num_bytes >= 16 * unit:
            return f"{-(-num_bytes // unit)}{name}"
    return f"{num_bytes}B"
