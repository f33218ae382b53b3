"""attach() under a quality bound: predicted, measured, refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from calibrated_model import (
    BUDGET,
    calibrated,
    measure_of,
    model,
    precisions,
    reference,
    too_hopeful,
)

from lib.blocks import partition_model
from lib.codecs.records import default_codec
from lib.errors import InputError, PlacementError
from lib.machine import UNMEASURED
from lib.policy.audit import Rule
from lib.policy.plan import Plan
from lib.policy.veto import Measured
from lib.tiering import attach, plan
from lib.tiering.planning.ledger import ledger_of
from lib.vocabulary import Precision, is_below


@pytest.mark.parametrize("epsilon", [0.003, "ppl=1.05"])
def test_precisions_come_from_epsilon_and_the_measured_kl_keeps_it(
    epsilon: float | str, tmp_path: Path
) -> None:
    measure = measure_of(reference())
    with attach(
        model(), calibrated(), budget=BUDGET, epsilon=epsilon, spill_dir=tmp_path
    ) as runtime:
        limit = runtime.veto.ledger.epsilon
        held = precisions(runtime)
        assert held == runtime.veto.ledger.floors
        assert len(set(held.values())) > 1
        assert Precision.INT2 not in held.values()
        assert 0.5 * limit < runtime.veto.bound_nats <= limit
        assert 0 < measure().kl_nats <= limit
        assert runtime.check_quality(measure).accepted
        assert runtime.audit.rejections == []


def test_a_precision_asked_for_is_raised_to_the_floor(tmp_path: Path) -> None:
    with attach(
        model(), calibrated(), budget=BUDGET, epsilon=0.01, precision="int4", spill_dir=tmp_path
    ) as runtime:
        floors = runtime.veto.ledger.floors
        for name, held in precisions(runtime).items():
            wanted = floors[name] if is_below(Precision.INT4, floors[name]) else Precision.INT4
            assert held in (wanted, Precision.FP32)
        assert runtime.veto.bound_nats <= 0.01


def test_a_width_that_is_slow_here_is_chosen_only_where_its_bytes_are_worth_it(
    tmp_path: Path,
) -> None:
    model().save_pretrained(tmp_path)
    hints = calibrated()
    bits = {p: 8 * default_codec(p).layout(4096, 1024).num_bytes / 2**22 for p in Precision}
    paced = {str(p): 8e10 / size for p, size in bits.items()}
    slow = paced | {"int6": 5e9, "int5": 5e9}

    def plan_of(compute: dict[str, float], size: str | int) -> Plan:
        machine = replace(UNMEASURED, compute=compute)
        budget = {"HBM": size, "SSD": None}
        return plan(tmp_path, hints, budget=budget, epsilon=0.003, machine=machine).plan

    def held(made: Plan) -> list[Precision]:
        places = made.placements.items()  # tables are so small here that padding decides
        return [place.precision for name, place in places if not name.endswith(("wte", "wpe"))]

    fewest = plan_of({}, "1GiB")
    assert held(plan_of(paced, "1GiB")) == held(fewest)
    assert {Precision.INT6, Precision.INT5} & set(held(fewest))
    fastest = plan_of(slow, "1GiB")
    assert not {Precision.INT6, Precision.INT5} & set(held(fastest))
    machines = [replace(UNMEASURED, compute=rates) for rates in (slow, paced)]
    one, other = (
        plan(tmp_path, hints, budget=BUDGET, epsilon=0.003, machine=machine).smallest_hbm_bytes
        for machine in machines
    )
    assert one == other
    small = plan_of(slow, fewest.fast_bytes)
    assert held(small) == held(fewest)  # the fastest widths have no room there
    assert fastest.predicted.seconds < small.predicted.seconds
    streamed = plan_of(slow, fewest.fast_bytes - 16384)
    assert streamed.predicted.moved_bytes and held(streamed) == held(fewest)


def test_what_kernels_cost_counts_against_epsilon(tmp_path: Path) -> None:
    hints = calibrated(kernel_nats=0.004)
    with attach(model(), hints, budget=BUDGET, epsilon=0.01, spill_dir=tmp_path) as runtime:
        blocks = [runtime.veto.ledger.bound(*held) or 0.0 for held in precisions(runtime).items()]
        assert 0 < sum(blocks) <= 0.006
        assert runtime.veto.bound_nats == pytest.approx(sum(blocks) + 0.004)
    with attach(model(), hints, budget=BUDGET, epsilon=0.004, spill_dir=tmp_path) as runtime:
        assert set(precisions(runtime).values()) == {Precision.FP32}
        assert runtime.veto.bound_nats == 0


def test_a_bound_needs_calibrated_hints() -> None:
    uncalibrated = replace(calibrated(), quality={})
    with pytest.raises(InputError, match="tierhints calibrate"):
        attach(model(), uncalibrated, budget=BUDGET, epsilon=0.01)
    with pytest.raises(InputError, match="epsilon needs hints"):
        attach(model(), budget=BUDGET, epsilon=0.01)
    with pytest.raises(InputError, match="measure has no effect without epsilon"):
        attach(model(), calibrated(), measure=lambda: Measured(kl_nats=0, upper_nats=0))
    with attach(model(), budget=BUDGET) as runtime:
        with pytest.raises(InputError, match="attach with epsilon="):
            runtime.check_quality(lambda: Measured(kl_nats=0, upper_nats=0))


def test_every_new_plan_passes_the_veto_before_anything_moves(tmp_path: Path) -> None:
    with attach(model(), calibrated(), budget=BUDGET, epsilon=0.01, spill_dir=tmp_path) as runtime:
        before, count = runtime.plan, runtime.audit.count
        runtime.budget = {"HBM": before.fast_bytes - 2**15, "SSD": None}
        assert runtime.audit.count > count  # what has moved is in the log
        assert any("S5" in record.asked for record in runtime.audit)
        after, expected = runtime.plan, reference()
        # Floors that are higher than what is held: no plan of these precisions is admitted.
        ledger = runtime.veto.ledger
        floors = dict.fromkeys(ledger.floors, Precision.FP32)
        runtime.veto.ledger = replace(ledger, floors=floors)
        with pytest.raises(PlacementError, match="the veto refuses the plan: block"):
            runtime.budget = BUDGET
        assert runtime.plan == after
        assert {record.broken for record in runtime.audit.rejections} == {Rule.FLOOR}
        assert torch.equal(reference(), expected)
        runtime.audit.save(tmp_path / "audit.jsonl")
        lines = (tmp_path / "audit.jsonl").read_text().splitlines()
        assert [json.loads(line)["number"] for line in lines] == list(range(len(lines)))


def test_below_three_bits_is_held_only_after_a_measurement(tmp_path: Path) -> None:
    hints = too_hopeful()
    blocks = partition_model(model())
    assert Precision.INT2 not in ledger_of(model(), blocks, hints, epsilon=0.02).floors.values()
    values: list[Measured] = []
    inner = measure_of(reference())

    def measure() -> Measured:
        values.append(inner())
        return values[-1]

    with attach(
        model(), hints, budget=BUDGET, epsilon=0.02, measure=measure, spill_dir=tmp_path
    ) as runtime:
        assert values[0].upper_nats > 0.02 >= values[-1].upper_nats
        assert "int2" in " ".join(record.asked for record in runtime.audit)
        assert Precision.INT2 not in precisions(runtime).values()
        assert len(runtime.audit.rejections) == len(values) - 1
        assert inner().kl_nats <= 0.02


def test_a_measured_plan_below_three_bits_is_held(tmp_path: Path) -> None:
    with attach(
        model(),
        calibrated(),
        budget=BUDGET,
        epsilon=2.0,
        measure=measure_of(reference()),
        spill_dir=tmp_path,
    ) as runtime:
        assert Precision.INT2 in precisions(runtime).values()
        assert runtime.veto.to_json()["joint_check"] == "passed"


def test_a_measurement_that_fails_leaves_the_model_as_it_was() -> None:
    def fail() -> Measured:
        raise ValueError("no text")

    expected = reference()
    with pytest.raises(ValueError, match="no text"):
        attach(model(), calibrated(), budget=BUDGET, epsilon=0.02, measure=fail)
    assert torch.equal(reference(), expected)
    with pytest.raises(PlacementError, match="every block is lossless"):
        attach(
            model(),
            calibrated(),
            budget=BUDGET,
            epsilon=0.02,
            precision="fp32",
            measure=lambda: Measured(kl_nats=1.0, upper_nats=1.0),
        )
    assert torch.equal(reference(), expected)
