"""attach() under a quality bound: predicted, measured, refused."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from lib.blocks import partition_model
from lib.errors import InputError, PlacementError
from lib.hints import BlockHint, Hints, Precision, Tier
from lib.policy.audit import Rule
from lib.policy.veto import Measure, Measured
from lib.precision.floors import is_below, raise_floors
from lib.precision.perturb import lossy_blocks
from lib.precision.quality import QualityMeter, measure_perturbations
from lib.tiering import Runtime, attach
from lib.tiering.admission import ledger_of

LADDER = [Precision.INT8, Precision.INT6, Precision.INT4, Precision.INT3, Precision.INT2]
BUDGET = {"HBM": "1GiB", "SSD": None}


@cache
def text() -> Tensor:
    return torch.randint(0, 97, (4, 24), generator=torch.Generator().manual_seed(1))


@cache
def model() -> GPT2LMHeadModel:
    """Large weights, so that precision costs something though nothing was learned."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2,
        n_embd=64,
        n_head=2,
        vocab_size=97,
        n_positions=32,
        initializer_range=0.15,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()


@cache
def calibrated() -> Hints:
    """Hints whose curves were measured, block by block."""
    pairs = [(block.name, p) for p in LADDER for block in lossy_blocks(model(), p)]
    measured = measure_perturbations(model(), [text()], [{name: p} for name, p in pairs])
    kl: dict[str, dict[Precision, float]] = {block.name: {} for block in partition_model(model())}
    for (name, precision), quality in zip(pairs, measured, strict=True):
        kl[name][precision] = quality.kl_nats
    return Hints(
        blocks={name: BlockHint(tier=Tier.HBM, kl=curve) for name, curve in kl.items()},
        quality={"calibrated": True, "conformal_factor": 1.2},
    )


def measure_of(reference: Tensor) -> Measure:
    """Measure the running model against the full one's logits."""

    def measure() -> Measured:
        meter = QualityMeter()
        with torch.inference_mode():
            meter.add(text(), reference, model()(text()).logits)
        quality = meter.result()
        assert quality.kl_interval is not None
        return Measured(kl_nats=quality.kl_nats, upper_nats=quality.kl_interval[1])

    return measure


def reference() -> Tensor:
    full, tokens = model(), text()
    with torch.inference_mode():
        return full(tokens).logits.clone()


def precisions(runtime: Runtime) -> dict[str, Precision]:
    return {name: place.precision for name, place in runtime.plan.placements.items()}


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


def test_a_bound_needs_calibrated_hints() -> None:
    uncalibrated = replace(calibrated(), quality={})
    with pytest.raises(InputError, match="calibrate_hints.py"):
        attach(model(), uncalibrated, budget=BUDGET, epsilon=0.01)
    with pytest.raises(InputError, match="epsilon needs hints"):
        attach(model(), budget=BUDGET, epsilon=0.01)
    with pytest.raises(InputError, match="measure has no effect without epsilon"):
        attach(model(), calibrated(), measure=lambda: Measured(kl_nats=0, upper_nats=0))
    attach(model(), budget=BUDGET).detach()


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


def test_a_canary_above_epsilon_stops_the_model_until_floors_are_raised(tmp_path: Path) -> None:
    expected = reference()
    runtime = attach(model(), calibrated(), budget=BUDGET, epsilon=0.01, spill_dir=tmp_path)
    low = precisions(runtime)
    record = runtime.check_quality(lambda: Measured(kl_nats=0.03, upper_nats=0.04))
    assert (record.accepted, record.broken) == (False, Rule.MEASURED)
    with pytest.raises(PlacementError, match=r"measured KL 0.03 is above epsilon 0.01 .* detach"):
        model()(text())
    runtime.detach()
    assert torch.equal(reference(), expected)
    raised = raise_floors(calibrated(), runtime.veto.ledger.floors)
    with attach(model(), raised, budget=BUDGET, epsilon=0.01, spill_dir=tmp_path) as runtime:
        high = precisions(runtime)
        assert not any(is_below(high[name], low[name]) for name in low)
        assert runtime.veto.bound_nats <= 0.01 / 4
        model()(text())


def test_below_three_bits_is_held_only_after_a_measurement(tmp_path: Path) -> None:
    hints = replace(
        calibrated(),
        blocks={
            # Predictions that promise too much.
            name: replace(hint, kl={p: kl / 50 for p, kl in hint.kl.items()})
            for name, hint in calibrated().blocks.items()
        },
    )
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
