"""Keeping a model under a plan: what is done when a forward shows that it needs another one.

More room for what is needed at the same time, less fast memory after an out-of-memory, room for
autocast's copies, floors that a measurement raised: each makes a plan, and no plan is carried out
that the veto refuses. Where carrying it out fails, the plan before is carried out again.
"""

import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace

import torch

from ..blocks import Block
from ..errors import InputError, PlacementError
from ..policy.audit import Record
from ..policy.plan import Plan
from ..units import format_bytes
from ..vocabulary import Tier
from .hooks.forwards import Forwards
from .hooks.progress import placing_bar
from .payload.groups import Group
from .payload.layout import Payload, whole_experts
from .planning.demands import Demand
from .planning.planned import Planned
from .residency.archive import Archive
from .residency.casting import autocast_dtype
from .residency.fast_memory import FastMemory
from .residency.originals import Originals
from .residency.residency import Residency
from .residency.stand_ins import plain_tensors
from .telemetry import BlockStats, Recorder
from .transfer.charges import Charges
from .transfer.transport import Transport

_STEP_DOWN = 0.85
"""What is left of the fast memory in use when an out-of-memory makes the runtime take less."""


class PlanKeeper:
    """A model under a plan; the watcher of its fast memory.

    Making one carries the first plan out. Where that fails the model is as it was.
    """

    def __init__(
        self,
        planned: Planned,
        originals: Originals,
        archive: Archive,
        *,
        transport: Transport,
        charges: Charges,
        look_ahead: bool = True,
    ) -> None:
        self.plan = planned.plan
        """Where each group of blocks is, and what that was predicted to cost."""
        self.planning = planned.planning
        self.veto = planned.veto
        self.payloads: Mapping[str, Payload] = self.planning.payloads
        """What groups are held as."""
        self.broken: str | None = None
        """Why nothing can run: moving weights has failed half-way."""
        self._final_plan: Plan | None = None
        """A plan that could not be made to hold what its forwards use."""
        self._unplanned = False
        """The present forward has needed what the plan before it did not foresee."""
        self.memory = FastMemory(planned.device, transport, charges, self)
        self.residency = Residency(
            self.payloads,
            self.memory,
            archive,
            originals,
            emulated=planned.emulation is not None,
            router_counts=planned.router_counts,
        )
        with plain_tensors():
            try:
                self.recorder = self._make_recorder()
                self._carry_out_first(planned, originals)
                self.forwards = Forwards(
                    planned.model,
                    self.residency,
                    self.recorder,
                    planned.schedule,
                    supervisor=self,
                    look_ahead=look_ahead,
                )
            except BaseException:
                self.residency.close()
                raise

    @property
    def budget(self) -> dict[str, int | None]:
        """Bytes that each tier may hold (None: no limit); empty where the hints alone decided."""
        return limits(self.plan)

    def reported_tier(self, group: Group, block: Block) -> str:
        """Return the tier under which a block is reported: that of its hint where hints place."""
        return str(self.plan.hint_tiers.get(block.name, self.plan.placements[group.name].tier))

    def bytes_per_tier(self) -> dict[str, int]:
        """Return the bytes of the blocks by the tier under which they are reported."""
        if not self.plan.hint_tiers:
            return {str(tier): size for tier, size in self.residency.bytes_per_tier().items()}
        totals: dict[str, int] = {}
        for payload in self.payloads.values():
            for block in payload.group.blocks:
                tier = str(self.plan.hint_tiers[block.name])
                totals[tier] = totals.get(tier, 0) + block.num_bytes
        return totals

    def carry_out(self, plan: Plan) -> None:
        """Move what must move, unless the veto refuses; where that fails the plan before stays."""
        payloads, schedule = self.planning.payloads, self.forwards.schedule
        moves = self.veto.judge(plan)
        before, broken = (self.plan, self.payloads), self.broken
        anew = [name for name in moves if payloads[name].precision is not before[1][name].precision]
        with plain_tensors():
            try:
                self.residency.apply(plan, payloads, schedule, moves)
                self._adopt(plan, payloads)
            except BaseException as error:
                # The way there, backwards; what was made anew had been let go of first.
                back = [*(name for name in reversed(moves) if name not in anew), *anew]
                try:
                    self.residency.apply(*before, schedule, back)
                    self._adopt(*before)
                    self.broken = broken
                except BaseException as again:
                    self.veto.adopt(None)
                    self.broken = (
                        f"weights could not be moved ({error}), nor back ({again}): free memory or "
                        "disk and set another budget, or detach"
                    )
                    self.forwards.follow_plan()
                raise

    def _adopt(self, plan: Plan, payloads: Mapping[str, Payload]) -> None:
        """Go by a plan that was carried out."""
        self.forwards.follow_plan()
        self.broken = None
        self.veto.adopt(plan)
        self.plan, self.payloads = plan, payloads
        for payload in payloads.values():
            for block in payload.group.blocks:
                self.recorder.blocks[block.name].tier = self.reported_tier(payload.group, block)
        now = self.residency.resident_bytes() + self.memory.extra_bytes
        self.recorder.change_resident(now - self.recorder.resident_bytes)

    def return_to(self, plan: Plan, payloads: Mapping[str, Payload]) -> None:
        """Go back to a plan, or to one of the same budget where floors were raised meanwhile."""
        if self.payloads is not payloads:
            try:
                plan = self.planning.make_plan(limits(plan) or None, self.forwards.schedule)
            except InputError as error:
                self.broken = (
                    "floors were raised, and the budget before doesn't hold the blocks as they "
                    f"are now: {error}; set a larger runtime.budget, or detach"
                )
                raise PlacementError(self.broken) from error
        self.carry_out(plan)

    def raise_floors(self, record: Record) -> None:
        """Hold blocks at the floors that a measurement has raised, or let nothing run."""
        self.broken = (
            f"{record.reason}, and raising them was interrupted; set runtime.budget, or detach"
        )
        self.planning.set_floors(self.veto.ledger.floors)
        try:
            plan = self.planning.make_plan(self.budget or None, self.forwards.schedule)
            self.carry_out(plan)
        except Exception as error:
            self.broken = (
                f"{record.reason}, and they can't be raised here: {error}; set a larger "
                "runtime.budget, or detach"
            )
            raise PlacementError(self.broken) from error

    # -- what forwards ask -------------------------------------------------------------------------

    def begin_forward(self) -> int:
        """Let a forward begin, or say why not; returns the bytes that it will stream."""
        if self.broken is not None:
            raise PlacementError(self.broken)
        self._unplanned = False
        if (dtype := autocast_dtype(self.memory.device)) is not None:
            self.leave_room_for_copies(dtype)
        streamed = (group.name for group in self.residency.moving if not group.is_routed)
        return sum(sum(self.plan.placements[name].unit_bytes) for name in streamed)

    def leave_room_for_copies(self, dtype: torch.dtype) -> None:
        """Plan again with room for the copies of weights that autocast computes with.

        Raises InputError where the budget has none, with the smallest that does; nothing has moved.
        """
        before = self.planning.casts
        if dtype in before or not self.plan.budget:
            return
        self.planning.casts = before | {dtype}
        try:
            plan = self.planning.make_plan(self.budget, self.forwards.expected)
        except InputError as error:
            self.planning.casts = before
            raise InputError(f"autocast makes a copy of the weights in use: {error}") from error
        with self.residency.holding():
            self.carry_out(plan)

    def end_forward(self, error: BaseException | None) -> None:
        """Hear of the end of a forward, and of the error that ended it."""
        if error is None:
            if self._unplanned and self.plan is not self._final_plan:
                self._plan_again()
        elif _is_out_of_memory(error):
            self._step_down(error)

    # -- what fast memory asks (residency.fast_memory.Watcher) -------------------------------------

    def alone(self) -> AbstractContextManager[None]:
        """Keep other threads from the slots, and a forked child from waiting for its parent's."""
        return self.forwards.alone()

    def moving(self, group: str) -> AbstractContextManager[Callable[[int], None]]:
        """Book a transfer that no module's hook asked for."""
        return self.forwards.moving(group)

    def used(self, group: str) -> None:
        """Trace a use outside the modules that own the weights."""
        self.forwards.note_use(group)
        placement = self.plan.placements[group]
        self._unplanned |= placement.tier is not Tier.HBM and not placement.unit_bytes

    def called(self, group: str) -> None:
        """Count a use of an expert."""
        self.recorder.count_call(group)

    def took(self, num_bytes: int) -> None:
        """Book fast memory beside slots and residents."""
        self.recorder.change_resident(num_bytes)

    def make_room(self, groups: Collection[str], whole: Collection[str]) -> None:
        """Plan again, within the budget and in the middle of a forward, for groups that it needs
        at the same time and parameters that it needs whole. Raises PlacementError with the smallest
        budget that works where this one doesn't.
        """
        running = self.residency.held_at_once(self.forwards.running)
        lent = self.memory.prefetcher.lent
        demand = Demand(frozenset({*groups, *running, *lent}), frozenset(whole))
        self.planning.learn(demand)
        what = "whole" if len(demand.groups) == 1 else "at the same time"
        try:
            plan = self.planning.make_plan(self._budget_left(), self.forwards.expected)
        except InputError as refusal:
            raise PlacementError(
                f"offloaded weights of {', '.join(sorted(demand.groups))} are needed {what}: "
                f"{self.explain(demand)}; or detach the runtime first"
            ) from refusal
        with self.residency.holding():
            self.carry_out(replace(plan, budget=self.plan.budget))
        self._unplanned = True

    def explain(self, demand: Demand | None = None) -> str:
        """Say why no plan within the budget is enough, and which budget is, also for what the same
        code may need next: code that keeps views of some weights may keep them of all.
        """
        payloads = self.planning.payloads
        if demand is None or self.memory.kept_bytes() or self.memory.extra_bytes:
            parts = [part.parameter for each in payloads.values() for part in each.parts]
            demand = Demand(frozenset(payloads), frozenset(parts))
        else:
            demand = demand.widened(payloads)
        return self.planning.explain(self.budget or None, self.forwards.expected, [demand])

    def _budget_left(self) -> dict[str, int | None] | None:
        """Return the budget without what others have kept views of."""
        budget, kept = self.budget, self.memory.kept_bytes()
        limit = budget.get(str(Tier.HBM))
        if kept and limit is not None:
            budget[str(Tier.HBM)] = max(limit - kept, 0)
        return budget or None

    def _plan_again(self) -> None:
        """Plan for what the forward has used, now that the order of its uses is known."""
        try:
            plan = self.planning.make_plan(self.budget or None, self.forwards.schedule)
            self.carry_out(plan)
        except (InputError, PlacementError) as refusal:  # the forward itself has gone well
            self._final_plan = self.plan
            warnings.warn(
                "an embedding is used whole, without a module, and a slot for it would be above "
                f"the budget: each use reads it in small pieces ({refusal})",
                RuntimeWarning,
                stacklevel=2,
            )

    def _step_down(self, error: BaseException) -> None:
        """Take less fast memory after an out-of-memory, so that the next forward has room."""
        tiers = self.budget or {"SSD": None}
        smaller = int(self.plan.fast_bytes * _STEP_DOWN)
        try:
            plan = self.planning.make_plan({**tiers, "HBM": smaller}, self.forwards.schedule)
            self.carry_out(plan)
        except Exception as refusal:  # raised from a hook, it would hide the out-of-memory
            error.add_note(f"the runtime can't do with less fast memory: {refusal}")
            return
        message = (
            f"out of memory: the runtime now takes {format_bytes(self.plan.fast_bytes)} of fast "
            "memory and goes on; run the forward again"
        )
        error.add_note(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)

    def _carry_out_first(self, planned: Planned, originals: Originals) -> None:
        experts = whole_experts(self.payloads.values())
        originals.prepare(planned.device, one_expert_at_a_time=experts)
        total = sum(payload.num_bytes for payload in self.payloads.values())
        with placing_bar(total) as progress:
            self.residency.apply(
                planned.plan, self.payloads, planned.schedule, planned.moves, progress=progress
            )
        self.veto.adopt(planned.plan)
        self.recorder.resident_bytes = self.residency.resident_bytes()
        self.recorder.reset()

    def _make_recorder(self) -> Recorder:
        return Recorder(
            device=self.memory.device,
            blocks={
                block.name: BlockStats(
                    tier=self.reported_tier(payload.group, block), num_bytes=block.num_bytes
                )
                for payload in self.payloads.values()
                for block in payload.group.blocks
            },
            resident_bytes=0,
        )


def limits(plan: Plan) -> dict[str, int | None]:
    """Return the budget of a plan; empty: it is by the hints."""
    return {str(tier): size for tier, size in plan.budget.items()}


def _is_out_of_memory(error: BaseException) -> bool:
    """Say whether memory has run out, as torch says it on a device and on the CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate" in str(error)
    )
