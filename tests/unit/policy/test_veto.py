import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from toy_blocks import MIB
from toy_ledgers import Budget, make_curve, plan_at, with_block

from lib.errors import PlacementError
from lib.policy import Plan
from lib.policy.audit import WHOLE_PLAN, Rule
from lib.policy.veto import Measured, Veto
from lib.precision.floors import (
    JointCheck,
    Ledger,
    make_ledger,
    open_ledger,
)
from lib.vocabulary import Precision, Tier


def toy_ledger(epsilon: float = 0.02, **fields: JointCheck) -> Ledger:
    curves = {"a": make_curve(1e-6), "b": make_curve(1e-5), "c": make_curve(1e-4)}
    return make_ledger(curves, epsilon=epsilon, factor=1.25, **fields)


def holding(ledger: Ledger, precisions: Mapping[str, Precision]) -> Veto:
    """A veto of a ledger that holds a plan of these precisions."""
    veto = Veto(ledger)
    veto.adopt(plan_at(ledger, precisions))
    return veto


def test_the_allocation_is_admitted_and_nothing_below_it() -> None:
    ledger = toy_ledger()
    veto = Veto(ledger)
    plan = plan_at(ledger, ledger.floors)
    assert sorted(veto.judge(plan)) == ["a", "b", "c"]
    veto.adopt(plan)
    assert veto.judge(plan) == ()
    assert 0 < veto.bound_nats <= 0.02
    assert veto.predicted_nats == pytest.approx(veto.bound_nats / 1.25)
    lower = {**ledger.floors, "c": Precision.INT3}
    with pytest.raises(PlacementError, match=r"block 'c': int3 is below the floor int5 .*1 more"):
        veto.judge(plan_at(ledger, lower))
    assert {record.broken for record in veto.audit.rejections} == {Rule.FLOOR, Rule.EPSILON}


def test_a_rejection_says_block_state_cost_limit_and_reason(tmp_path: Path) -> None:
    ledger = toy_ledger()
    veto = holding(ledger, dict.fromkeys("abc", Precision.FP32))
    held = plan_at(ledger, dict.fromkeys("abc", Precision.FP32))
    with pytest.raises(PlacementError, match="the veto refuses the plan: block 'c'"):
        veto.judge(with_block(held, ledger, "c", Precision.INT3, Tier.HBM))
    record = veto.audit.rejections[0]
    assert (record.block, record.accepted, record.broken) == ("c", False, Rule.FLOOR)
    assert record.asked == "int3 S1 -> S3"
    assert record.predicted == pytest.approx(1.25e-4 * 4.5**4.5)
    assert record.limit == ledger.bound("c", ledger.floors["c"])
    assert record.reason == "int3 is below the floor int5 (asked for)"
    assert veto.judge(with_block(held, ledger, "c", Precision.INT5, Tier.SSD)) == ("c",)
    veto.audit.save(tmp_path / "audit.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [line["broken"] for line in lines] == ["floor", "epsilon", None]
    assert lines[2]["asked"] == "int5 S1 -> S5"


def test_the_ledger_is_full_before_every_block_is_at_the_lowest_precision() -> None:
    curves = {name: make_curve(1e-5) for name in "abcd"}
    ledger = make_ledger(curves, epsilon=math.inf, factor=1.0)
    bound = ledger.bound("a", Precision.INT4)
    assert bound is not None
    ledger = replace(ledger, epsilon=2.5 * bound)
    held = plan_at(ledger, dict.fromkeys("abcd", Precision.FP32))
    veto = Veto(ledger)

    def ask(name: str, precision: Precision) -> bool:
        nonlocal held
        plan = with_block(held, ledger, name, precision, Tier.SSD)
        try:
            veto.judge(plan)
        except PlacementError:
            return False
        veto.adopt(plan)
        held = plan
        return True

    assert [ask(name, Precision.INT4) for name in "abcd"] == [True, True, False, False]
    assert veto.audit.rejections[0].broken is Rule.EPSILON
    assert ask("a", Precision.INT8)
    assert ask("c", Precision.INT4)
    assert veto.bound_nats <= 2.5 * bound


def test_a_precision_without_a_prediction_is_refused() -> None:
    ledger = toy_ledger()
    curves = {**ledger.curves, "a": replace(ledger.curves["a"], kl_nats={})}
    veto = Veto(replace(ledger, curves=curves, floors={}))
    with pytest.raises(PlacementError, match="nothing predicts what int8 would cost"):
        veto.judge(plan_at(ledger, dict.fromkeys("abc", Precision.INT8)))
    assert veto.audit.rejections[0].broken is Rule.NO_PREDICTION


def test_a_plan_that_passes_a_budget_is_refused() -> None:
    ledger = toy_ledger()
    plan = plan_at(ledger, ledger.floors)
    veto = Veto(ledger)
    for budget, tier in (
        ({Tier.HBM: plan.fast_bytes - 1}, "HBM"),
        ({Tier.CPU: None}, "HBM"),  # not named: not to be used
    ):
        with pytest.raises(PlacementError, match=f"bytes would pass the budget of .* for {tier}"):
            veto.judge(replace(plan, budget=budget))
        assert veto.audit.rejections[-1].block == WHOLE_PLAN
    originals = replace(plan, budget={Tier.HBM: None, Tier.SSD: 10}, original_bytes=11)
    with pytest.raises(PlacementError, match="bytes would pass the budget of 10 for SSD"):
        veto.judge(originals)


def test_moves_keep_the_budgets_on_the_way_or_are_refused() -> None:
    ledger = open_ledger({name: make_curve(1.0, mib=1) for name in "ab"})
    lossless = dict.fromkeys("ab", Precision.FP32)
    free = plan_at(ledger, lossless)

    def placed(a: Tier, b: Tier, budget: Budget) -> Plan:
        plan = with_block(free, ledger, "a", Precision.FP32, a)
        return replace(with_block(plan, ledger, "b", Precision.FP32, b), budget=budget)

    full = {Tier.HBM: MIB, Tier.CPU: MIB, Tier.SSD: None}
    veto = Veto(ledger)
    veto.adopt(placed(Tier.HBM, Tier.CPU, full))
    assert veto.judge(placed(Tier.CPU, Tier.SSD, full)) == ("b", "a")
    assert veto.judge(placed(Tier.SSD, Tier.HBM, full)) == ("a", "b")
    with pytest.raises(PlacementError, match="on its way .* a larger budget"):
        veto.judge(placed(Tier.CPU, Tier.HBM, full))
    assert veto.audit.rejections[-1].broken is Rule.BUDGET
    assert veto.judge(placed(Tier.CPU, Tier.HBM, {**full, Tier.CPU: 2 * MIB})) == ("a", "b")


def test_where_the_usual_order_of_moves_gets_stuck_others_are_tried() -> None:
    sizes = dict(zip("abcde", (3, 2, 7, 6, 1), strict=True))
    ledger = open_ledger({name: make_curve(1.0, mib=size) for name, size in sizes.items()})
    budget = {Tier.HBM: 9 * MIB, Tier.CPU: 14 * MIB, Tier.SSD: 8 * MIB}

    def placed(tiers: str) -> Plan:
        plan = plan_at(ledger, dict.fromkeys(sizes, Precision.FP32))
        for name, tier in zip(sizes, tiers.split(), strict=True):
            plan = with_block(plan, ledger, name, Precision.FP32, Tier(tier))
        return replace(plan, budget=budget)

    veto = Veto(ledger)
    veto.adopt(placed("CPU CPU SSD HBM HBM"))
    assert sorted(veto.judge(placed("HBM HBM CPU CPU HBM"))) == ["a", "b", "c", "d"]


def test_below_three_bits_is_refused_until_all_blocks_were_measured_together() -> None:
    curves = {"a": make_curve(1e-9), "b": make_curve(1e-9)}
    pending = make_ledger(curves, epsilon=0.01, factor=1.0, joint_check=JointCheck.PENDING)
    plan = plan_at(pending, {"a": Precision.INT2, "b": Precision.INT4})
    with pytest.raises(PlacementError, match="below 3 bits"):
        Veto(replace(pending, joint_check=JointCheck.MISSING)).judge(plan)
    veto = Veto(pending)
    veto.judge(plan)
    veto.adopt(plan)
    assert veto.judge_measured(Measured(kl_nats=0.005, upper_nats=0.009)).accepted
    assert veto.ledger.joint_check is JointCheck.PASSED
    # Only what was measured is admitted: not a lower precision of another block.
    with pytest.raises(PlacementError, match="block 'b': int2 is below the floor int4"):
        veto.judge(with_block(plan, pending, "b", Precision.INT2, Tier.SSD))
    veto.judge(with_block(plan, pending, "a", Precision.INT2, Tier.SSD))


def test_a_pending_check_needs_the_upper_bound_within_epsilon() -> None:
    curves = {"a": make_curve(1e-9)}
    ledger = make_ledger(curves, epsilon=0.01, factor=1.0, joint_check=JointCheck.PENDING)
    veto = holding(ledger, {"a": Precision.INT2})
    measured = Measured(kl_nats=0.005, upper_nats=0.011)
    record = veto.judge_measured(measured)
    assert (record.accepted, record.broken) == (False, Rule.MEASURED)
    assert veto.below_floors() == ["a"]
    veto.adopt(plan_at(veto.ledger, veto.ledger.floors))
    assert not veto.judge_measured(measured).accepted  # it still needs the upper bound
    assert veto.num_raised == 2


def test_the_canary_raises_floors_when_the_measured_value_passes_epsilon() -> None:
    ledger = toy_ledger()
    plan = plan_at(ledger, ledger.floors)
    veto = holding(ledger, ledger.floors)
    assert veto.judge_measured(Measured(kl_nats=0.019, upper_nats=0.03)).accepted
    assert veto.below_floors() == []
    record = veto.judge_measured(Measured(kl_nats=0.05, upper_nats=0.08))
    assert not record.accepted
    assert "above epsilon 0.02" in record.reason
    assert veto.below_floors()
    assert veto.bound_nats == pytest.approx(0.08)
    with pytest.raises(PlacementError):
        veto.judge(plan)
    raised = plan_at(veto.ledger, veto.ledger.floors)
    veto.judge(raised)
    veto.adopt(raised)
    assert veto.bound_nats <= 0.02
    assert veto.to_json()["floors_raised"] == 1


@pytest.mark.parametrize("nats", [math.nan, math.inf, -math.inf, -0.5])
@pytest.mark.parametrize("check", JointCheck)
def test_what_is_no_kl_admits_nothing_compressed(nats: float, check: JointCheck) -> None:
    ledger = replace(toy_ledger(), joint_check=check)
    veto = holding(ledger, ledger.floors)
    for measured in (Measured(kl_nats=nats, upper_nats=nats), Measured(kl_nats=0, upper_nats=nats)):
        assert not veto.judge_measured(measured).accepted
    assert set(veto.ledger.floors.values()) == {Precision.FP32}
    assert "no KL" in veto.audit.rejections[0].reason
    assert json.dumps(veto.to_json(), allow_nan=False)


def test_a_measurement_of_lossless_weights_raises_nothing() -> None:
    veto = holding(toy_ledger(), dict.fromkeys("abc", Precision.FP32))
    record = veto.judge_measured(Measured(kl_nats=1.0, upper_nats=1.0))
    assert "every block is lossless" in record.reason
    assert veto.ledger == toy_ledger()


def test_without_epsilon_the_floors_of_the_hints_hold() -> None:
    ledger = open_ledger({"a": make_curve(1.0, lowest=Precision.INT4), "b": make_curve(1.0)})
    veto = Veto(ledger)
    with pytest.raises(PlacementError, match="floor int4"):
        veto.judge(plan_at(ledger, {"a": Precision.INT3, "b": Precision.INT2}))
    veto.judge(plan_at(ledger, {"a": Precision.INT4, "b": Precision.INT2}))
    assert veto.to_json()["epsilon_nats"] is None
    json.dumps(veto.to_json(), allow_nan=False)


def test_the_audit_says_what_was_asked_for_and_no_way() -> None:
    ledger = toy_ledger()
    lossless = plan_at(ledger, dict.fromkeys("abc", Precision.FP32))
    held = with_block(lossless, ledger, "a", Precision.INT4, Tier.HBM)
    veto = Veto(ledger)
    veto.adopt(held)
    veto.judge(with_block(held, ledger, "a", Precision.INT8, Tier.HBM))
    assert [record.asked for record in veto.audit] == ["int8 S3 -> S3"]
