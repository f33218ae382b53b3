"""From a budget to a plan: what a model's groups are held as, what they need, and where they go.

Without a budget every group goes where its hints say; with one, the planner decides. Floors that a
measurement has raised change what groups are held as, and with that every plan that follows.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from ...blocks import Block
from ...errors import InputError
from ...hints import Hints
from ...machine import MachineProfile
from ...policy.plan import BlockNeed, Plan, Step, definition_schedule
from ...policy.planner.by_hints import place_by_hints
from ...policy.planner.planner import make_plan, smallest_budget
from ...policy.planner.problem import Problem
from ...vocabulary import Precision, Tier
from ..payload.layout import Payload
from ..residency.casting import copy_bytes
from ..transfer.specs import EmulationSpec
from .budget import (
    Budget,
    find_place,
    leave_room,
    original_bytes,
    parse_budget,
    with_originals,
)
from .demands import Demand
from .needs import PrecisionChoice, block_needs, expanded_bytes, make_payloads, scratch_bytes

Mode = Literal["real", "emulated"]


class Planning:
    """Makes the plans of one model. ``precision`` None: lossless, or with ``at_floors`` what the
    floors allow. ``keeps_originals``: those of compressed weights have to be stored.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        hints: Hints | None,
        *,
        precision: PrecisionChoice,
        at_floors: bool,
        floors: Mapping[str, Precision],
        device: torch.device,
        mode: Mode,
        machine: MachineProfile,
        keeps_originals: bool,
        emulation: EmulationSpec | None,
    ) -> None:
        self._model = model
        self._blocks = blocks
        self._hints = hints
        self._precision = precision
        self._at_floors = at_floors
        self._device = device
        self._mode: Mode = mode
        self._machine = machine
        self._keeps_originals = keeps_originals
        self.emulation = emulation
        """What an emulated run charges; None in real mode. Plans use no tier that it lacks."""
        self.casts: frozenset[torch.dtype] = frozenset()
        """What autocast computes in: plans have room for copies of the weights in use."""
        self.payloads: dict[str, Payload] = {}
        """What each group is held as in the plans that are made now."""
        self._demands: dict[Demand, None] = {}
        """What forwards have needed at the same time, in the order in which it was seen."""
        self.needs: list[BlockNeed] = []
        """What each group asks for."""
        self.set_floors(floors)

    @property
    def schedule(self) -> tuple[Step, ...]:
        """The uses to expect before a forward was traced."""
        return definition_schedule(self.needs)

    def set_floors(self, floors: Mapping[str, Precision]) -> None:
        """Hold every group as asked for, but none below its floor, from the next plan on."""
        self.payloads = make_payloads(
            self._model,
            self._blocks,
            precision=floors if self._at_floors else self._precision,
            floors=floors,
        )
        self._ask()

    def learn(self, demand: Demand) -> None:
        """Meet a demand in every plan from now on, and what corresponds to it in other layers."""
        self._demands |= dict.fromkeys(demand.like(self.payloads))
        self._ask()

    def explain(
        self, budget: Budget | None, schedule: Sequence[Step], demands: Iterable[Demand]
    ) -> str:
        """Say why a budget isn't enough for these demands, too; they are not learnt."""
        known = self._demands
        self._demands = dict(known)
        try:
            for demand in demands:
                self.learn(demand)
            self.make_plan(budget, schedule)
        except InputError as refusal:
            return str(refusal)
        finally:
            self._demands = known
            self._ask()
        return "give a larger HBM budget"

    def _ask(self) -> None:
        self.needs = block_needs(
            self._model,
            self.payloads,
            hints=self._hints,
            device=self._device,
            machine=self._machine,
            demands=self._demands,
        )

    def _with_demands(self, schedule: Sequence[Step]) -> list[Step]:
        """Add full uses of what was foreseen to be looked up only."""
        full = {step.block for step in schedule if not step.lookup}
        asked = {name: None for demand in self._demands for name in sorted(demand.groups)}
        looked_up = {need.name for need in self.needs if need.lookup_bytes}
        return [*schedule, *(Step(name) for name in asked if name in looked_up - full)]

    def make_plan(self, budget: Budget | None, schedule: Sequence[Step]) -> Plan:
        """Plan within a budget, or None: by the hints.

        Raises InputError for a wrong budget, and for one too small, with the smallest that works.
        """
        kept = self._kept_bytes()
        if budget is not None:
            parsed = parse_budget(budget, self._device, self._mode)
            plan = make_plan(*self._ask_for(parsed, schedule, kept))
        else:
            parsed, plan = {}, self._plan_by_hints()
        if self.emulation is not None:
            self.emulation.check(plan)
        expanded = expanded_bytes(self.payloads, self._demands)
        return with_originals(replace(plan, expanded_bytes=expanded), parsed, kept)

    def smallest_budget(self, budget: Mapping[Tier, int | None], schedule: Sequence[Step]) -> int:
        """Return the smallest HBM bytes that work beside the limits of a budget's other tiers."""
        return smallest_budget(*self._ask_for(budget, schedule, self._kept_bytes()))

    def problem(self, budget: Mapping[Tier, int | None], schedule: Sequence[Step]) -> Problem:
        """Return what the planner chooses among within the limits of a budget."""
        return Problem(*self._ask_for(budget, schedule, self._kept_bytes()))

    def _kept_bytes(self) -> int:
        """Return what the originals take that have to be stored."""
        return original_bytes(self._model, self.payloads.values()) if self._keeps_originals else 0

    def _ask_for(
        self, budget: Mapping[Tier, int | None], schedule: Sequence[Step], kept_bytes: int
    ) -> tuple[list[BlockNeed], list[Step], dict[Tier, int | None], MachineProfile, int]:
        """Return what the planner is asked: needs, schedule, room, machine and scratch bytes."""
        room = leave_room(budget, kept_bytes)
        scratch = scratch_bytes(self.payloads, self._demands) + max(
            copy_bytes(payload, self.casts, whole=False) for payload in self.payloads.values()
        )
        needs = [self._need_with_copies(need) for need in self.needs]
        return needs, self._with_demands(schedule), room, self._machine, scratch

    def _need_with_copies(self, need: BlockNeed) -> BlockNeed:
        """Add what a weight that moves by rows takes more where it resides: its whole copy."""
        payload = self.payloads[need.name]
        whole = copy_bytes(payload, self.casts, whole=True)
        more = whole - copy_bytes(payload, self.casts, whole=False)
        return replace(need, resident_bytes=need.resident_bytes + more) if more else need

    def _plan_by_hints(self) -> Plan:
        """Put every group where the hints of its blocks say."""
        assert self._hints is not None
        tiers = {block.name: self._hints.blocks[block.name].tier for block in self._blocks}
        hinted_bytes: dict[str, dict[Tier, int]] = {}
        for name, payload in self.payloads.items():
            sums = hinted_bytes[name] = {}
            for block in payload.group.blocks:
                tier = find_place(tiers[block.name], block.name, self._device, self._mode)
                sums[tier] = sums.get(tier, 0) + block.num_bytes
        scratch = scratch_bytes(self.payloads, self._demands)
        plan = place_by_hints(self.needs, hinted_bytes, scratch_bytes=scratch)
        return replace(plan, hint_tiers=tiers)
