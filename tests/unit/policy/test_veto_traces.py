"""Traces of memory pressure through the planner and the veto, with what must hold after each event.

Asked for are other budgets, fewer bits, single blocks, and what no planner would: a plan that its
budget doesn't hold. Measurements raise floors in between, after which the runtime plans anew.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_blocks import MIB
from toy_ledgers import HBM_AND_DISK, LADDER, Budget, make_curve, plan_at, with_block

from lib.errors import InputError, PlacementError
from lib.policy import Plan
from lib.policy.audit import WHOLE_PLAN, Record, Rule
from lib.policy.veto import Measured, Veto
from lib.precision.floors import JointCheck, Ledger, make_ledger, open_ledger
from lib.vocabulary import Precision, Tier, is_below


@st.composite
def ledgers(draw: st.DrawFn) -> Ledger:
    """Blocks whose floors come from epsilon, from the hints alone, or from both."""
    exponents = draw(st.lists(st.integers(-9, -3), min_size=1, max_size=4))
    curves = {
        f"b{index}": make_curve(
            10.0**exponent,
            mib=draw(st.sampled_from([1, 8])),
            lowest=draw(st.sampled_from([None, None, Precision.INT6, Precision.INT3])),
        )
        for index, exponent in enumerate(exponents)
    }
    kernel_nats = draw(st.sampled_from([0.0, 3e-5, 2e-3]))
    if draw(st.booleans()):
        epsilon = draw(st.sampled_from([1e-4, 1e-2, 0.3]))
        return make_ledger(curves, epsilon=epsilon, factor=1.3, kernel_nats=kernel_nats)
    # Floors that don't add up to epsilon: the sum itself has to hold.
    return Ledger(
        epsilon=draw(st.sampled_from([1e-4, 1e-2, math.inf])),
        factor=1.3,
        curves=curves,
        floors=open_ledger(curves).floors,
        exchange_rate=0.0,
        gap=0.0,
        joint_check=draw(st.sampled_from(list(JointCheck))),
        kernel_nats=kernel_nats,
    )


Event = tuple[int, int, int]
EVENTS = st.lists(
    st.tuples(st.integers(0, 9), st.integers(0, 10**6), st.integers(0, 6)), min_size=1, max_size=8
)
TIERS = [Tier.HBM, Tier.CPU, Tier.SSD]


class Trace:
    """Memory pressure and measurements, and after each what must hold of what is held.

    ``stopped``: a measurement has raised floors and no plan at these was admitted, so that the
    runtime lets nothing run.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.veto = Veto(ledger)
        self.names = list(ledger.curves)
        self.stopped = False
        self.budget: Budget = HBM_AND_DISK
        self.held = plan_at(ledger, {name: curve.native for name, curve in ledger.curves.items()})
        assert self.ask(self.held)

    def run(self, events: list[Event]) -> None:
        for kind, number, step in events:
            if kind < 3:  # pressure on all: another budget, and for some blocks fewer bits
                self.plan(self.precisions(kind, number, step), self.limits(number, step))
            elif kind < 6:  # a single block
                name, tier = self.names[number % len(self.names)], TIERS[number % 3]
                ledger = self.veto.ledger
                self.ask(
                    replace(
                        with_block(self.held, ledger, name, LADDER[step], tier), budget=self.budget
                    )
                )
            elif kind < 8:  # what is held, within another budget: no planner looks at that
                budget = self.limits(number, step)
                admitted = self.ask(replace(self.held, budget=budget))
                assert not (admitted and over(self.held, budget))
            else:  # a measurement; if floors rise, the runtime plans anew at once
                value = number / 1e6 * (1e-3 if kind == 8 else 1.0)
                self.veto.judge_measured(Measured(kl_nats=value, upper_nats=value * 1.5))
                if self.veto.below_floors():
                    self.stopped = True
                    self.plan(self.at_floors(), self.budget)
            self.check()

    def precisions(self, kind: int, number: int, step: int) -> dict[str, Precision]:
        if kind == 0:
            return {name: place.precision for name, place in self.held.placements.items()}
        return {
            name: LADDER[min(6, step + (number >> 2 * index & 3))]
            for index, name in enumerate(self.names)
        }

    def at_floors(self) -> dict[str, Precision]:
        floors = self.veto.ledger.floors
        held = self.held.placements
        return {
            name: floors[name]
            if name in floors and is_below(held[name].precision, floors[name])
            else held[name].precision
            for name in self.names
        }

    def limits(self, number: int, step: int) -> Budget:
        budget: dict[Tier, int | None] = {Tier.HBM: number * 24 % (24 * MIB)}
        if step & 1:
            budget[Tier.CPU] = number * 7 % (16 * MIB)
        if step & 6:
            budget[Tier.SSD] = None if step & 2 else number * 11 % (32 * MIB)
        return budget

    def plan(self, precisions: Mapping[str, Precision], budget: Budget) -> None:
        try:
            plan = plan_at(self.veto.ledger, precisions, budget)
        except InputError:
            return  # the planner's own answer: nothing fits
        self.ask(plan)

    def ask(self, plan: Plan) -> bool:
        before, count = len(self.veto.audit.rejections), self.veto.audit.count
        try:
            moves = self.veto.judge(plan)
        except PlacementError:
            new = self.veto.audit.rejections[before:]
            assert new
            for record in new:
                check_explained(self.veto.ledger, plan, record)
            return False
        assert [record.block for record in self.veto.audit][count:] == list(moves)
        check_moves(self.held, plan, moves)
        self.veto.adopt(plan)
        self.held, self.budget, self.stopped = plan, plan.budget, False
        return True

    def check(self) -> None:
        ledger = self.veto.ledger
        assert not over(self.held, self.held.budget)
        bounds = []
        for name, place in self.held.placements.items():
            bounds.append(ledger.bound(name, place.precision) or 0.0)
            if self.stopped:
                continue
            assert name not in ledger.floors or not is_below(place.precision, ledger.floors[name])
            assert place.precision is not Precision.INT2 or (
                ledger.joint_check is not JointCheck.MISSING or ledger.epsilon == math.inf
            )
        total = math.fsum(bounds)
        total += ledger.kernel_nats if total else 0.0
        assert self.veto.bound_nats == total
        assert self.stopped or total <= ledger.epsilon


def sizes(plan: Plan) -> dict[Tier, int]:
    totals = dict.fromkeys(TIERS, 0)
    for place in plan.placements.values():
        totals[place.tier] += place.resident_bytes or place.stored_bytes
    totals[Tier.HBM] += plan.num_slots * plan.slot_bytes
    return totals


def over(plan: Plan, budget: Budget) -> bool:
    limits = {tier: budget.get(tier, 0) for tier in TIERS}
    return any(
        limit is not None and size > limit
        for size, limit in zip(sizes(plan).values(), limits.values(), strict=True)
    )


def check_moves(held: Plan, plan: Plan, moves: tuple[str, ...]) -> None:
    """Move block by block, each in both tiers for a moment, and look at every tier each time."""
    place = {
        name: now
        for name, now in held.placements.items()
        if now.precision is plan.placements[name].precision
    }
    for name in moves:
        target = plan.placements[name]
        there = [p for other, p in place.items() if p.tier is target.tier and other != name]
        size = sum(p.resident_bytes or p.stored_bytes for p in [*there, target])
        limit = plan.budget.get(target.tier, 0)
        assert limit is None or size <= limit
        place[name] = target
    assert {name: p.tier for name, p in place.items()} == {
        name: p.tier for name, p in plan.placements.items()
    }


def check_explained(ledger: Ledger, plan: Plan, record: Record) -> None:
    assert record.broken is not None
    assert record.block in ledger.curves or record.block == WHOLE_PLAN
    assert record.predicted is not None or record.broken is Rule.NO_PREDICTION
    if record.broken is Rule.FLOOR:
        assert f"is below the floor {ledger.floors[record.block]}" in record.reason
        assert is_below(plan.placements[record.block].precision, ledger.floors[record.block])
    elif record.broken is Rule.EPSILON:
        assert f"epsilon {ledger.epsilon:.4g}" in record.reason
        assert record.predicted is not None and record.predicted > ledger.epsilon
    elif record.broken is Rule.JOINT_CHECK:
        assert "below 3 bits" in record.reason
    elif record.broken is Rule.BUDGET:
        assert f"{record.predicted} bytes would pass the budget of {record.limit}" in record.reason
        assert record.predicted is not None and record.limit is not None
        assert record.predicted > record.limit
        assert over(plan, plan.budget) == (record.block == WHOLE_PLAN)
    else:
        raise AssertionError(f"{record.broken}: {record.reason}")


@settings(max_examples=1000, deadline=None)
@given(ledger=ledgers(), events=EVENTS)
def test_no_pressure_passes_a_floor_or_a_budget_and_each_rejection_is_explained(
    ledger: Ledger, events: list[Event]
) -> None:
    Trace(ledger).run(events)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None)
@given(ledger=ledgers(), events=EVENTS)
def test_ten_thousand_traces_of_pressure(ledger: Ledger, events: list[Event]) -> None:
    Trace(ledger).run(events)
