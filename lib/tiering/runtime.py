"""The runtime: a model under a plan, and what may change while it is attached.

Another budget, another emulated machine, less memory after an out-of-memory, floors that a
measurement raised: each makes a plan, and no plan is carried out that the veto refuses.
"""

import contextlib
import math
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from types import MappingProxyType, TracebackType
from typing import NoReturn, Self

import torch
from torch import nn

from ..blocks import Block
from ..errors import InputError, PlacementError
from ..policy.audit import Audit, Record
from ..policy.plan import Plan, Step
from ..policy.veto import Measure, Veto
from ..units import format_bytes
from ..vocabulary import Tier
from .hooks.forwards import Forwards
from .payload.groups import Group
from .payload.layout import Payload
from .planning.demands import Demand
from .planning.plans import Planning
from .residency.casting import autocast_dtype
from .residency.reader import plain_tensors
from .residency.residency import Residency
from .telemetry import BlockStats, Recorder, Stats
from .transfer.emulation import EmulatedLink
from .transfer.specs import Clock, EmulationSpec

_STEP_DOWN = 0.85
"""What is left of the fast memory in use when an out-of-memory makes the runtime take less."""


class Runtime:
    """A model under a plan; a context manager that detaches. Runs one forward at a time."""

    def __init__(
        self,
        model: nn.Module,
        blocks: tuple[Block, ...],
        residency: Residency,
        plan: Plan,
        planning: Planning,
        veto: Veto,
        *,
        emulated: EmulatedLink | None,
        device: torch.device,
        schedule: Sequence[Step],
        labels: Mapping[str, Tier],
    ) -> None:
        self.mode = "real" if emulated is None else "emulated"
        self._emulated = emulated
        self.plan = plan
        """Where each group of blocks is, and what that was predicted to cost."""
        self.veto = veto
        """Judges every plan before anything moves; knows floors, bounds and what is held."""
        self._model = model
        self._blocks = {block.name: block for block in blocks}
        self._residency = residency
        self._planning = planning
        self._payloads = planning.payloads
        """What groups are held as."""
        self._labels = labels
        self._broken: str | None = None
        """Why nothing can run: moving weights has failed half-way."""
        self._detached = False
        self._final_plan: Plan | None = None
        """A plan that could not be made to hold what its forwards use."""
        self._unplanned = False
        """The present forward has needed what the plan before it did not foresee."""
        self._extra_bytes = 0
        """Fast memory that expanded weights take now."""
        self._recorder = Recorder(
            device=device,
            blocks={
                block.name: BlockStats(
                    tier=str(self._tier_of(group, block)), num_bytes=block.num_bytes
                )
                for group in residency.groups
                for block in group.blocks
            },
            resident_bytes=residency.resident_bytes(),
        )
        self._recorder.reset()
        residency.access.on_extra = self._note_extra
        residency.access.on_use = self._note_use
        residency.access.make_room = self._make_room
        residency.access.spare_bytes = self._spare_bytes
        residency.access.explain = self._explain
        self._forwards = Forwards(
            model,
            residency,
            self._recorder,
            schedule,
            begin_forward=self._begin_forward,
            end_forward=self._end_forward,
        )

    def __enter__(self) -> Self:
        """Return the runtime itself; it is attached already."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Detach."""
        self.detach()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse to be copied or pickled, alone or with what refers to it."""
        raise PlacementError(
            "a runtime can't be copied or pickled: detach it first, and attach to each copy of the "
            "model"
        )

    @property
    def budget(self) -> dict[str, int | None]:
        """The bytes that each tier may hold (None: no limit); empty where the hints alone decided.

        Setting it plans anew and moves what must move, between forwards, without reloading the
        model. Raises InputError for a budget that is too small (nothing has moved then), and
        PlacementError during a forward.
        """
        return _limits(self.plan)

    @budget.setter
    def budget(self, budget: Mapping[str, str | int | None]) -> None:
        with self._forwards.lock:
            if self._detached:
                raise PlacementError("the budget can't be changed after detach: attach again")
            self._forwards.refuse_other_processes()
            self._forwards.check_idle()
            self._carry_out(self._planning.make_plan(budget or {}, self._forwards.schedule))

    @contextlib.contextmanager
    def limited(self, budget: Mapping[str, str | int | None]) -> Iterator[Self]:
        """Run under another budget for a while; the plan before comes back.

        Raises PlacementError where its budget doesn't hold floors that a measurement has raised
        meanwhile: nothing runs then until a larger budget is set, or the model detached.
        """
        before, labels, payloads = self.plan, self._labels, self._payloads
        self.budget = budget
        try:
            yield self
        except BaseException as error:
            try:
                self._return_to(before, labels, payloads)
            except Exception as failure:  # the first error is the one to see
                error.add_note(str(failure))
            raise
        self._return_to(before, labels, payloads)

    @property
    def clock(self) -> Clock:
        """How time passes: really, or added up."""
        return Clock.WALL if self._emulated is None else self._emulated.spec.clock

    @property
    def emulation(self) -> EmulationSpec | None:
        """The machine that emulated mode charges for; None in real mode.

        Setting it asks "what if" of the same plan on another machine, between forwards; what is on
        its way then still takes its time, so the forward after is not typical. Raises InputError
        for a machine that lacks a tier of the plan, in real mode, and for another clock.
        """
        return None if self._emulated is None else self._emulated.spec

    @emulation.setter
    def emulation(self, spec: EmulationSpec) -> None:
        with self._forwards.lock:
            if self._emulated is None:
                raise InputError("real mode emulates no machine: attach with mode='emulated'")
            if spec.clock is not self.clock:
                raise InputError(
                    f"the clock is {self.clock} since attach and can't become {spec.clock}: attach "
                    "again"
                )
            self._forwards.check_idle()
            before, self._emulated.spec = self._emulated.spec, spec
            try:
                self._emulated.check(self.plan)
            except InputError:
                self._emulated.spec = before
                raise

    @property
    def audit(self) -> Audit:
        """What was asked of the veto, and what it answered."""
        return self.veto.audit

    def check_quality(self, measure: Measure) -> Record:
        """Measure the KL of the model as it runs; while it is above epsilon, raise floors and hold
        the blocks that are below them more precisely, within the present budget.

        ``measure`` runs forwards on held-out text. Returns the record of the last measurement, one
        that epsilon admits. Raises PlacementError where the budget doesn't hold the raised floors,
        or the original weights can't be read: nothing runs then until a larger budget is set, or
        the model detached. And where all weights are lossless already and the KL is above epsilon
        all the same: it is of another model then, or another text encoding.
        """
        with self._forwards.lock:
            if self._detached:
                raise PlacementError("quality can't be measured after detach: attach again")
            if math.isinf(self.veto.ledger.epsilon):
                raise InputError("there is no bound to hold a measurement to: attach with epsilon=")
            self._forwards.refuse_other_processes()
            self._forwards.check_idle()
            while not (record := self.veto.judge_measured(measure())).accepted:
                if not self.veto.below_floors():
                    raise PlacementError(record.reason)
                self._raise_floors(record)
            return record

    @property
    def virtual_seconds(self) -> float:
        """Emulated time charged on the virtual clock since attach or the last reset; 0 where time
        is really spent.
        """
        return self._residency.virtual_seconds

    def stats(self) -> Stats:
        """Return what happened since attach or the last reset; waits for a GPU."""
        with self._forwards.lock:
            return self._recorder.snapshot(
                mode=self.mode,
                clock=str(self.clock),
                wait_error=self._residency.wait_error(),
                bytes_per_tier=self._bytes_per_tier(),
            )

    def reset_stats(self) -> None:
        """Start all statistics anew."""
        with self._forwards.lock:
            self._recorder.reset()
            self._residency.reset()

    def detach(self) -> None:
        """Take the hooks off and bring every weight back, bit for bit; a second call does nothing.

        Raises PlacementError if weights could not be brought back (stored bytes were damaged, or
        memory is short): the parameters concerned stay unusable rather than wrong, and detach may
        be called again.
        """
        if self._detached:
            return
        with self._forwards.lock:
            self._forwards.refuse_other_processes()
            self._forwards.check_idle()
            self._forwards.remove()
            with plain_tensors():
                self._residency.close()
            self._detached = True

    def _begin_forward(self) -> int:
        """Let a forward begin, or say why not; returns the bytes that it will stream."""
        if self._broken is not None:
            raise PlacementError(self._broken)
        self._unplanned = False
        dtype = autocast_dtype(self._residency.device)
        casts = self._forwards.casts | ({dtype} if dtype is not None else set())
        if self.plan.budget and not casts <= self._planning.casts:
            self._leave_room_for_copies(casts)
        return sum(sum(place.unit_bytes) for place in self.plan.placements.values())

    def _leave_room_for_copies(self, casts: Set[torch.dtype]) -> None:
        """Plan again with room for the copies of weights that autocast computes with.

        Raises InputError where the budget has none, with the smallest that does; nothing has moved.
        """
        before, self._planning.casts = self._planning.casts, self._planning.casts | casts
        try:
            plan = self._planning.make_plan(self.budget, self._forwards.schedule)
        except InputError as error:
            self._planning.casts = before
            raise InputError(f"autocast makes a copy of the weights in use: {error}") from error
        self._carry_out(plan)

    def _end_forward(self, error: BaseException | None) -> None:
        if error is None:
            if self._unplanned and self.plan is not self._final_plan:
                self._plan_again()
        elif _is_out_of_memory(error):
            self._step_down(error)

    def _carry_out(self, plan: Plan, labels: Mapping[str, Tier] = MappingProxyType({})) -> None:
        """Move what must move, unless the veto refuses; where that fails the plan before is carried
        out again.
        """
        payloads = self._planning.payloads
        moves = self.veto.judge(plan)
        with plain_tensors():
            try:
                self._residency.apply(plan, payloads, self._forwards.schedule, moves)
            except BaseException as error:
                # The way there, backwards; what was made anew had been let go of first.
                made = [
                    name
                    for name in moves
                    if payloads[name].precision is not self._payloads[name].precision
                ]
                back = [name for name in reversed(moves) if name not in made] + made
                try:
                    self._residency.apply(self.plan, self._payloads, self._forwards.schedule, back)
                except BaseException as again:
                    self.veto.adopt(None)
                    self._broken = (
                        f"weights could not be moved ({error}), nor back ({again}): free memory "
                        "or disk and set another budget, or detach"
                    )
                raise
        self._broken = None
        self.veto.adopt(plan)
        self.plan, self._payloads, self._labels = plan, payloads, labels
        for group in self._residency.groups:
            for block in group.blocks:
                self._recorder.blocks[block.name].tier = str(self._tier_of(group, block))
        self._recorder.change_resident(
            self._residency.resident_bytes() + self._extra_bytes - self._recorder.resident_bytes
        )

    def _return_to(
        self, plan: Plan, labels: Mapping[str, Tier], payloads: Mapping[str, Payload]
    ) -> None:
        """Go back to a plan, or to one of the same budget where floors were raised meanwhile."""
        with self._forwards.lock:
            if self._detached:
                return
            self._forwards.check_idle()
            if self._payloads is not payloads:
                try:
                    plan = self._planning.make_plan(_limits(plan) or None, self._forwards.schedule)
                except InputError as error:
                    self._broken = (
                        "floors were raised, and the budget before doesn't hold the blocks as they "
                        f"are now: {error}; set a larger runtime.budget, or detach"
                    )
                    raise PlacementError(self._broken) from error
            self._carry_out(plan, labels)

    def _raise_floors(self, record: Record) -> None:
        """Hold blocks at the floors that a measurement has raised, or let nothing run."""
        self._broken = (
            f"{record.reason}, and raising them was interrupted; set runtime.budget, or detach"
        )
        self._planning.set_floors(self.veto.ledger.floors)
        try:
            plan = self._planning.make_plan(self.budget or None, self._forwards.schedule)
            self._carry_out(plan, self._labels)
        except Exception as error:
            self._broken = (
                f"{record.reason}, and they can't be raised here: {error}; set a larger "
                "runtime.budget, or detach"
            )
            raise PlacementError(self._broken) from error

    def _step_down(self, error: BaseException) -> None:
        """Take less fast memory after an out-of-memory, so that the next forward has room."""
        tiers = self.budget or {"SSD": None}
        smaller = int(self.plan.fast_bytes * _STEP_DOWN)
        try:
            self._carry_out(
                self._planning.make_plan({**tiers, "HBM": smaller}, self._forwards.schedule)
            )
        except Exception as refusal:  # raised from a hook, it would hide the out-of-memory
            error.add_note(f"the runtime can't do with less fast memory: {refusal}")
            return
        message = (
            f"out of memory: the runtime now takes {format_bytes(self.plan.fast_bytes)} of fast "
            "memory and goes on; run the forward again"
        )
        error.add_note(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)

    def _note_use(self, group: str) -> None:
        self._forwards.note_use(group)
        placement = self.plan.placements[group]
        self._unplanned |= placement.tier is not Tier.HBM and not placement.unit_bytes

    def _note_extra(self, num_bytes: int) -> None:
        self._extra_bytes += num_bytes
        self._recorder.change_resident(num_bytes)

    def _spare_bytes(self) -> int | None:
        """Return the fast memory that expanded weights may still take; None: any."""
        limit = self.plan.limit(Tier.HBM)
        if limit is None:
            return None
        taken = self.plan.fast_bytes - self.plan.expanded_bytes
        return limit - taken - self._extra_bytes - self._residency.left_bytes

    def _make_room(self, groups: Collection[str], whole: Collection[str]) -> None:
        """Plan again, within the budget and in the middle of a forward, for groups that it needs
        at the same time and parameters that it needs whole. Raises PlacementError with the smallest
        budget that works where this one doesn't.
        """
        running = self._residency.held_at_once(self._forwards.running)
        lent = self._residency.access.prefetcher.lent
        demand = Demand(frozenset({*groups, *running, *lent}), frozenset(whole))
        self._planning.learn(demand)
        what = "whole" if len(demand.groups) == 1 else "at the same time"
        try:
            plan = self._planning.make_plan(self._budget_left(), self._forwards.expected)
        except InputError as refusal:
            raise PlacementError(
                f"offloaded weights of {', '.join(sorted(demand.groups))} are needed {what}: "
                f"{self._explain(demand)}; or detach the runtime first"
            ) from refusal
        with self._residency.holding():
            self._carry_out(replace(plan, budget=self.plan.budget), self._labels)
        self._unplanned = True

    def _budget_left(self) -> dict[str, int | None] | None:
        """Return the budget without what others have kept views of."""
        budget, left = self.budget, self._residency.access.left_bytes()
        limit = budget.get(str(Tier.HBM))
        if left and limit is not None:
            budget[str(Tier.HBM)] = max(limit - left, 0)
        return budget or None

    def _explain(self, demand: Demand | None = None) -> str:
        """Say why no plan within the budget is enough, and which budget is.

        Who keeps views of some weights may keep them of all, and who takes one weight of a layer
        whole may take the layer's others beside it.
        """
        payloads = self._planning.payloads
        if demand is None or self._residency.access.left_bytes() or self._extra_bytes:
            beside = list(payloads)
        else:
            layers = {payloads[name].group.layer for name in demand.groups if demand.whole} - {None}
            beside = [name for name, each in payloads.items() if each.group.layer in layers]
        parts = [part.parameter for name in beside for part in payloads[name].parts]
        expected = [Demand(frozenset(beside), frozenset(parts))] if beside else []
        return self._planning.explain(self.budget or None, self._forwards.expected, expected)

    def _plan_again(self) -> None:
        """Plan for what the forward has used, now that the order of its uses is known."""
        try:
            plan = self._planning.make_plan(self.budget or None, self._forwards.schedule)
            self._carry_out(plan, self._labels)
        except (InputError, PlacementError) as refusal:  # the forward itself has gone well
            self._final_plan = self.plan
            warnings.warn(
                "an embedding is used whole, without a module, and a slot for it would be above "
                f"the budget: each use reads it in small pieces ({refusal})",
                RuntimeWarning,
                stacklevel=2,
            )

    def _tier_of(self, group: Group, block: Block) -> Tier:
        return self._labels.get(block.name, self.plan.placements[group.name].tier)

    def _bytes_per_tier(self) -> dict[str, int]:
        if not self._labels:
            return {str(tier): size for tier, size in self._residency.bytes_per_tier().items()}
        totals: dict[str, int] = {}
        for name, tier in self._labels.items():
            totals[str(tier)] = totals.get(str(tier), 0) + self._blocks[name].num_bytes
        return totals


def _limits(plan: Plan) -> dict[str, int | None]:
    """Return the budget of a plan; empty: it is by the hints."""
    return {str(tier): size for tier, size in plan.budget.items()}


def _is_out_of_memory(error: BaseException) -> bool:
    """Say whether memory has run out, as torch says it on a device and on the CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate" in str(error)
    )
