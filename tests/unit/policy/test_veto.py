import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_blocks import MIB, make_machine, make_need

from lib.errors import InputError, PlacementError
from lib.hints import Precision, Tier
from lib.policy import BlockNeed, Plan, State, definition_schedule, make_plan
from lib.policy.audit import WHOLE_PLAN, Rule
from lib.policy.veto import Measured, Veto
from lib.precision.floors import (
    Curve,
    JointCheck,
    Ledger,
    is_below,
    make_ledger,
    open_ledger,
)

BITS = {"fp32": 32.0, "int8": 8.0, "int6": 6.5, "int5": 5.5, "int4": 4.5, "int3": 3.5, "int2": 2.5}
LADDER = [Precision(name) for name in BITS]
BELOW = [State.STAGED, State.COLD]
STATES = [State.FULL, State.REDUCED, State.COMPRESSED, *BELOW]
HBM_AND_DISK = {Tier.HBM: None, Tier.SSD: None}


def make_curve(scale: float, *, mib: int = 8, lowest: Precision | None = None) -> Curve:
    """A block of ``mib`` MiB in float32 whose KL grows by 4.5 a bit, from ``scale`` at 8 bits."""
    return Curve(
        native=Precision.FP32,
        kl_nats={p: scale * 4.5 ** (8 - BITS[p]) for p in LADDER[1:]},
        cost={p: mib * MIB * BITS[p] / 32 for p in LADDER},
        lowest=lowest,
    )


def toy_ledger(epsilon: float = 0.02, **fields: JointCheck) -> Ledger:
    curves = {"a": make_curve(1e-6), "b": make_curve(1e-5), "c": make_curve(1e-4)}
    return make_ledger(curves, epsilon=epsilon, factor=1.25, **fields)


def plan_at(ledger: Ledger, precisions: dict[str, Precision], hbm: int | None = None) -> Plan:
    needs: list[BlockNeed] = []
    for name, curve in ledger.curves.items():
        size = int(curve.cost[precisions[name]])
        needs.append(make_need(name, size, precision=precisions[name], compute_seconds=1e-3))
    budget = {Tier.HBM: hbm, Tier.SSD: None}
    return make_plan(needs, definition_schedule(needs), budget, make_machine(), 0)


def test_the_allocation_is_admitted_and_nothing_below_it() -> None:
    ledger = toy_ledger()
    veto = Veto(ledger)
    plan = plan_at(ledger, dict(ledger.floors))
    veto.check_plan(plan)
    veto.adopt(plan)
    assert 0 < veto.bound_nats <= 0.02
    assert veto.predicted_nats == pytest.approx(veto.bound_nats / 1.25)
    lower = {**ledger.floors, "c": Precision.INT3}
    with pytest.raises(PlacementError, match=r"block 'c': int3 is below the floor int5 .*1 more"):
        veto.check_plan(plan_at(ledger, lower))
    assert {record.broken for record in veto.audit.rejections} == {Rule.FLOOR, Rule.EPSILON}


def test_a_rejection_says_block_state_cost_limit_and_reason(tmp_path: Path) -> None:
    veto = Veto(toy_ledger())
    veto.move("c", Precision.FP32, State.FULL, reason="loaded")
    record = veto.move("c", Precision.INT3, State.COMPRESSED, reason="memory is short")
    assert (record.block, record.accepted, record.broken) == ("c", False, Rule.FLOOR)
    assert record.asked == "int3 S1 -> S3"
    assert record.predicted == pytest.approx(1.25e-4 * 4.5**4.5)
    assert record.limit == veto.ledger.bound("c", veto.ledger.floors["c"])
    assert record.reason == "int3 is below the floor int5 (memory is short)"
    veto.audit.save(tmp_path / "audit.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [line["number"] for line in lines] == [0, 1]
    assert lines[1]["broken"] == "floor"


def test_the_ledger_is_full_before_every_block_is_at_the_lowest_precision() -> None:
    curves = {name: make_curve(1e-5) for name in "abcd"}
    ledger = make_ledger(curves, epsilon=math.inf, factor=1.0)
    bound = ledger.bound("a", Precision.INT4)
    assert bound is not None
    veto = Veto(Ledger(**{**_fields(ledger), "epsilon": 2.5 * bound}))
    accepted = [
        veto.move(name, Precision.INT4, State.STAGED, reason="pressure").accepted for name in "abcd"
    ]
    assert accepted == [True, True, False, False]
    assert veto.audit.rejections[0].broken is Rule.EPSILON
    assert veto.move("a", Precision.INT8, State.STAGED, reason="room again").accepted
    assert veto.move("c", Precision.INT4, State.STAGED, reason="pressure").accepted
    assert veto.bound_nats <= 2.5 * bound


def _fields(ledger: Ledger) -> dict[str, object]:
    return {name: getattr(ledger, name) for name in Ledger.__dataclass_fields__}


def test_unknown_blocks_and_precisions_without_a_prediction_are_refused() -> None:
    veto = Veto(toy_ledger())
    record = veto.check("a", Precision.BF16, State.FULL, reason="wish")
    assert (record.accepted, record.broken) == (False, Rule.NO_PREDICTION)
    with pytest.raises(InputError, match="'x' is no block"):
        veto.check("x", Precision.FP32, State.FULL, reason="wish")


def test_a_plan_that_passes_its_budget_is_refused() -> None:
    ledger = toy_ledger()
    plan = plan_at(ledger, dict(ledger.floors))
    veto = Veto(ledger)
    small = Plan(**{**_plan_fields(plan), "budget": {Tier.HBM: plan.fast_bytes - 1}})
    with pytest.raises(PlacementError, match="bytes would pass the budget of"):
        veto.check_plan(small)
    assert veto.audit.rejections[-1].block == WHOLE_PLAN


def _plan_fields(plan: Plan) -> dict[str, object]:
    return {name: getattr(plan, name) for name in Plan.__dataclass_fields__}


def test_below_three_bits_is_refused_until_all_blocks_were_measured_together() -> None:
    curves = {"a": make_curve(1e-9), "b": make_curve(1e-9)}
    pending = make_ledger(curves, epsilon=0.01, factor=1.0, joint_check=JointCheck.PENDING)
    missing = Ledger(**{**_fields(pending), "joint_check": JointCheck.MISSING})
    plan = plan_at(pending, {"a": Precision.INT2, "b": Precision.INT4})
    with pytest.raises(PlacementError, match="below 3 bits"):
        Veto(missing).check_plan(plan)
    veto = Veto(pending)
    veto.check_plan(plan)
    veto.adopt(plan)
    assert veto.judge_measured(Measured(kl_nats=0.005, upper_nats=0.009)).accepted
    assert veto.ledger.joint_check is JointCheck.PASSED
    # Only what was measured is admitted: not a lower precision of another block.
    assert not veto.check("b", Precision.INT2, State.STAGED, reason="pressure").accepted
    assert veto.check("a", Precision.INT2, State.STAGED, reason="pressure").accepted


def test_a_pending_check_needs_the_upper_bound_within_epsilon() -> None:
    curves = {"a": make_curve(1e-9)}
    veto = Veto(make_ledger(curves, epsilon=0.01, factor=1.0, joint_check=JointCheck.PENDING))
    veto.adopt(plan_at(veto.ledger, {"a": Precision.INT2}))
    record = veto.judge_measured(Measured(kl_nats=0.005, upper_nats=0.011))
    assert (record.accepted, record.broken) == (False, Rule.MEASURED)
    assert veto.ledger.joint_check is JointCheck.MISSING
    assert veto.check_held() == ["a"]


def test_the_canary_raises_floors_when_the_measured_value_passes_epsilon() -> None:
    ledger = toy_ledger()
    veto = Veto(ledger)
    plan = plan_at(ledger, dict(ledger.floors))
    veto.adopt(plan)
    assert veto.judge_measured(Measured(kl_nats=0.019, upper_nats=0.03)).accepted
    assert veto.check_held() == []
    record = veto.judge_measured(Measured(kl_nats=0.05, upper_nats=0.08))
    assert not record.accepted
    assert "above epsilon 0.02" in record.reason
    assert veto.check_held()
    assert veto.bound_nats == pytest.approx(0.08)
    with pytest.raises(PlacementError):
        veto.check_plan(plan)
    raised = plan_at(veto.ledger, dict(veto.ledger.floors))
    veto.check_plan(raised)
    veto.adopt(raised)
    assert veto.bound_nats <= 0.02


def test_a_measurement_of_lossless_weights_raises_nothing() -> None:
    veto = Veto(toy_ledger())
    veto.adopt(plan_at(veto.ledger, dict.fromkeys("abc", Precision.FP32)))
    record = veto.judge_measured(Measured(kl_nats=1.0, upper_nats=1.0))
    assert "every block is lossless" in record.reason
    assert veto.ledger == toy_ledger()


def test_without_epsilon_the_floors_of_the_hints_hold() -> None:
    curves = {"a": make_curve(1.0, lowest=Precision.INT4), "b": make_curve(1.0)}
    veto = Veto(open_ledger(curves))
    assert not veto.move("a", Precision.INT3, State.STAGED, reason="pressure").accepted
    assert veto.move("a", Precision.INT4, State.STAGED, reason="pressure").accepted
    assert veto.move("b", Precision.INT2, State.STAGED, reason="pressure").accepted
    assert veto.to_json()["epsilon_nats"] is None
    json.dumps(veto.to_json(), allow_nan=False)


def test_precision_is_won_back_from_below_only() -> None:
    veto = Veto(toy_ledger())
    veto.move("a", Precision.INT4, State.COMPRESSED, reason="pressure")
    assert veto.check("a", Precision.INT8, State.COMPRESSED, reason="room").asked == (
        "int8 S3 -> S4 -> S6 -> S3"
    )


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
    if draw(st.booleans()):
        epsilon = draw(st.sampled_from([1e-4, 1e-2, 0.3]))
        return make_ledger(curves, epsilon=epsilon, factor=1.3)
    # Floors that don't add up to epsilon: the sum itself has to hold.
    return Ledger(
        epsilon=draw(st.sampled_from([1e-4, 1e-2, math.inf])),
        factor=1.3,
        curves=curves,
        floors=open_ledger(curves).floors,
        exchange_rate=0.0,
        gap=0.0,
        joint_check=draw(st.sampled_from([JointCheck.MISSING, JointCheck.PASSED])),
    )


Event = tuple[int, int, int]
EVENTS = st.lists(
    st.tuples(st.integers(0, 7), st.integers(0, 10**6), st.integers(0, 6)), min_size=1, max_size=6
)


def run_trace(ledger: Ledger, events: list[Event]) -> None:
    """Let memory pressure ask for plans and changes, and check after each what is held."""
    veto = Veto(ledger)
    held = dict.fromkeys(ledger.curves, Precision.FP32)
    names = list(ledger.curves)
    for kind, number, step in events:
        if kind < 4:  # pressure on all: less memory, and for some blocks fewer bits
            asked = {
                name: LADDER[min(6, step + (number >> 2 * index & 3))] if kind else held[name]
                for index, name in enumerate(names)
            }
            hbm = number % (24 * MIB)
            try:
                plan = plan_at(ledger, asked, hbm)
            except InputError:
                continue
            assert plan.fast_bytes <= hbm
            before = len(veto.audit.rejections)
            try:
                veto.check_plan(plan)
            except PlacementError:
                assert len(veto.audit.rejections) > before
            else:
                veto.adopt(plan)
                held = asked
        elif kind < 7:
            name = names[number % len(names)]
            precision = LADDER[step]
            if veto.move(name, precision, STATES[number % 5], reason="pressure").accepted:
                held[name] = precision
        else:
            veto.judge_measured(Measured(kl_nats=0.0, upper_nats=number / 1e6))
        check_held(veto, held)
    for record in veto.audit.rejections:
        check_explained(ledger, record.block, record.broken, record.reason)
        assert record.predicted is not None or record.broken is Rule.NO_PREDICTION


def check_held(veto: Veto, held: dict[str, Precision]) -> None:
    ledger = veto.ledger
    for name, precision in held.items():
        assert name not in ledger.floors or not is_below(precision, ledger.floors[name])
        assert precision is not Precision.INT2 or (
            ledger.joint_check is JointCheck.PASSED or ledger.epsilon == math.inf
        )
    bounds = [ledger.bound(name, precision) or 0.0 for name, precision in held.items()]
    assert veto.bound_nats == math.fsum(bounds)
    assert math.fsum(bounds) <= ledger.epsilon


def check_explained(ledger: Ledger, block: str, broken: Rule | None, reason: str) -> None:
    assert broken is not None
    assert block in ledger.curves or block == WHOLE_PLAN
    if broken is Rule.FLOOR:
        assert f"is below the floor {ledger.floors[block]}" in reason
    elif broken is Rule.EPSILON:
        assert f"epsilon {ledger.epsilon:.4g}" in reason
    elif broken is Rule.JOINT_CHECK:
        assert "below 3 bits" in reason
    else:
        raise AssertionError(f"{broken}: {reason}")


@settings(max_examples=1000, deadline=None)
@given(ledger=ledgers(), events=EVENTS)
def test_no_pressure_passes_a_floor_or_a_budget_and_each_rejection_is_explained(
    ledger: Ledger, events: list[Event]
) -> None:
    run_trace(ledger, events)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None)
@given(ledger=ledgers(), events=EVENTS)
def test_ten_thousand_traces_of_pressure(ledger: Ledger, events: list[Event]) -> None:
    run_trace(ledger, events)
