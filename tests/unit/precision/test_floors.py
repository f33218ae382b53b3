import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.errors import InputError
from lib.hints import BlockHint, Hints
from lib.precision.floors import (
    Curve,
    JointCheck,
    check_kernels,
    make_ledger,
    merge_curves,
    open_ledger,
    parse_epsilon,
    raise_floors,
    read_trust,
    tighten,
)
from lib.vocabulary import Precision, Tier, is_below, most_precise

LADDER = [Precision.INT8, Precision.INT6, Precision.INT5, Precision.INT4, Precision.INT3]
LADDER += [Precision.INT2]
BITS = dict(zip([Precision.FP32, *LADDER], [32, 8, 6.5, 5.5, 4.5, 3.5, 2.5], strict=True))


def make_curve(scale: float, *, params: int = 1000, lowest: Precision | None = None) -> Curve:
    """A curve that grows by 4.5 a bit, from ``scale`` at 8 bits."""
    return Curve(
        native=Precision.FP32,
        kl_nats={precision: scale * 4.5 ** (8 - BITS[precision]) for precision in LADDER},
        cost={precision: params * bits / 8 for precision, bits in BITS.items()},
        lowest=lowest,
    )


@st.composite
def curve_sets(draw: st.DrawFn) -> dict[str, Curve]:
    """Blocks with any curves, not all of them monotone, not all of them complete."""
    curves = {}
    for index in range(draw(st.integers(1, 6))):
        known = draw(st.lists(st.sampled_from(LADDER), unique=True))
        curves[f"b{index}"] = Curve(
            native=Precision.FP32,
            kl_nats={p: draw(st.floats(0, 0.3)) for p in LADDER if p in known},
            cost={p: draw(st.integers(1, 9)) * bits for p, bits in BITS.items()},
            lowest=draw(st.sampled_from([None, Precision.INT6, Precision.FP32])),
        )
    return curves


@pytest.mark.parametrize(
    ("text", "nats"),
    [("0.02", 0.02), (0.02, 0.02), ("ppl=1.02", math.log(1.02)), (" PPL=1.5 ", math.log(1.5))],
)
def test_epsilon_is_nats_or_a_perplexity_ratio(text: str, nats: float) -> None:
    assert parse_epsilon(text) == pytest.approx(nats)


@pytest.mark.parametrize("text", ["", "0", "-1", "nan", "ppl=1", "ppl=0.9", "kl=0.1", "5", "x"])
def test_other_epsilons_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"above 0 and at most 4 \(0.02\), or .*\(ppl=1.02\)"):
        parse_epsilon(text)


@pytest.mark.parametrize("quality", [{}, {"calibrated": True}, {"conformal_factor": 1.3}])
def test_without_calibration_the_error_says_what_to_run(quality: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"tierhints calibrate --model \.\.\. --tier-hints"):
        read_trust(quality)


CALIBRATED = {
    "calibrated": True,
    "conformal_factor": 1.33,
    "conformal_probes": 60,
    "kernels": {"name": "cpu, bf16", "nats": 4e-5},
}


def test_what_calibrated_hints_say_of_themselves_is_read() -> None:
    trust = read_trust(CALIBRATED)
    assert (trust.factor, trust.kernel_nats, trust.kernels) == (1.33, 4e-5, "cpu, bf16")


def test_too_few_probes_are_refused_unless_there_are_no_more() -> None:
    few = {**CALIBRATED, "conformal_probes": 42}
    with pytest.raises(InputError, match=r"42 probes, .* needs 59, or all .*tierhints calibrate"):
        read_trust(few)
    with pytest.raises(InputError, match="0 probes"):
        read_trust({"calibrated": True, "conformal_factor": 1.33})
    assert read_trust({**few, "exhaustive": True}).factor == 1.33


def test_hints_must_know_what_kernels_cost() -> None:
    with pytest.raises(InputError, match=r"what kernels cost .*tierhints calibrate"):
        read_trust({key: value for key, value in CALIBRATED.items() if key != "kernels"})


def test_a_small_epsilon_on_other_kernels_is_refused() -> None:
    trust = read_trust(CALIBRATED)
    check_kernels(trust, "cpu, bf16", epsilon=1e-5)
    check_kernels(trust, "cuda", epsilon=0.01)
    with pytest.raises(InputError, match=r"unknown here \(cuda\).*at least 0.01"):
        check_kernels(trust, "cuda", epsilon=1e-3)
    rounding = replace(trust, kernel_nats=2e-4)
    with pytest.raises(InputError, match=r"at least 0.02"):
        check_kernels(rounding, "cuda", epsilon=0.01)


@given(epsilon=st.floats(1e-7, 1e-2))
def test_kernels_are_paid_before_any_block_is_compressed(epsilon: float) -> None:
    curves = {"free": replace(make_curve(1e-9), kl_nats={Precision.INT8: 0.0})}
    curves |= {f"b{index}": make_curve(10.0 ** -(5 + index)) for index in range(4)}
    ledger = make_ledger(curves, epsilon=epsilon, factor=1.2, kernel_nats=4e-5)
    bounds = [ledger.bound(name, floor) or 0.0 for name, floor in ledger.floors.items()]
    assert sum(bounds) == 0 or sum(bounds) + ledger.kernel_nats <= epsilon
    if epsilon <= 4e-5:  # what a precision happens to hold exactly has kernels all the same
        assert set(ledger.floors.values()) == {Precision.FP32}
    assert tighten(ledger, ratio=1.5).kernel_nats == ledger.kernel_nats >= 4e-5


@given(curves=curve_sets(), epsilon=st.floats(1e-6, 1), factor=st.floats(0.5, 3))
def test_whatever_keeps_every_floor_keeps_epsilon(
    curves: dict[str, Curve], epsilon: float, factor: float
) -> None:
    ledger = make_ledger(curves, epsilon=epsilon, factor=factor)
    worst = 0.0
    for name, curve in curves.items():
        floor = ledger.floors[name]
        allowed = [p for p in [Precision.FP32, *LADDER] if not is_below(p, floor)]
        bounds = [ledger.bound(name, precision) for precision in allowed]
        worst += max(bound for bound in bounds if bound is not None)
        assert floor is not Precision.INT2
        assert curve.lowest is None or not is_below(floor, curve.lowest)
        for precision in LADDER:
            bound, predicted = ledger.bound(name, precision), ledger.predicted(name, precision)
            assert (bound is None) == (predicted is None)
            assert bound is None or predicted is None or bound >= predicted * factor
    assert worst <= epsilon


def test_a_sensitive_block_gets_the_higher_floor() -> None:
    curves = {"robust": make_curve(1e-7), "sensitive": make_curve(1e-4)}
    floors = make_ledger(curves, epsilon=0.02, factor=1.2).floors
    assert floors == {"robust": Precision.INT3, "sensitive": Precision.INT5}


def test_more_epsilon_never_costs_more_bytes() -> None:
    curves = {f"b{index}": make_curve(10.0 ** -(4 + index % 4)) for index in range(20)}
    costs = []
    for epsilon in (1e-3, 1e-2, 1e-1, 1.0):
        floors = make_ledger(curves, epsilon=epsilon, factor=1).floors
        costs.append(sum(curves[name].cost[floor] for name, floor in floors.items()))
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > costs[-1]


def test_below_three_bits_needs_a_joint_check() -> None:
    curves = {"b": make_curve(1e-9)}
    for check, floor in [
        (JointCheck.MISSING, Precision.INT3),
        (JointCheck.PENDING, Precision.INT2),
    ]:
        ledger = make_ledger(curves, epsilon=0.1, factor=1, joint_check=check)
        assert ledger.floors == {"b": floor}


def test_a_tightened_ledger_lowers_no_floor_and_keeps_epsilon() -> None:
    curves = {f"b{index}": make_curve(10.0 ** -(4 + index % 3)) for index in range(9)}
    loose = make_ledger(curves, epsilon=0.05, factor=1, joint_check=JointCheck.PENDING)
    tight = tighten(loose, ratio=8)
    assert tight.joint_check is JointCheck.MISSING
    assert not any(is_below(tight.floors[name], floor) for name, floor in loose.floors.items())
    bounds = [tight.bound(name, floor) or 0.0 for name, floor in tight.floors.items()]
    assert sum(bounds) <= 0.05
    assert tight.bound("b0", Precision.INT8) == pytest.approx(8e-4)


def test_without_epsilon_only_the_floors_of_the_hints_hold() -> None:
    curves = {
        "a": make_curve(1.0, lowest=Precision.INT4),
        "b": make_curve(1.0),
        "c": replace(make_curve(1.0, lowest=Precision.FP32), native=Precision.BF16),
    }
    assert open_ledger(curves).floors == {"a": Precision.INT4, "c": Precision.BF16}


def test_blocks_that_are_held_as_one_add_up() -> None:
    first = BlockHint(
        tier=Tier.HBM, kl={Precision.INT8: 0.1, Precision.INT4: 0.5}, floor=Precision.INT4
    )
    second = BlockHint(tier=Tier.HBM, kl={Precision.INT8: 0.2}, floor=Precision.INT6)
    kl_nats, floor = merge_curves([first, second])
    assert kl_nats == {Precision.INT8: pytest.approx(0.3)}
    assert floor is Precision.INT6
    assert merge_curves([]) == ({}, None)


def test_raised_floors_go_into_the_hints_of_every_expert() -> None:
    hints = Hints(
        blocks={
            "h.0.attn": BlockHint(tier=Tier.HBM, floor=Precision.INT6),
            "h.0.experts.0": BlockHint(tier=Tier.HBM),
            "h.0.experts.1": BlockHint(tier=Tier.HBM, floor=Precision.INT8),
        }
    )
    raised = raise_floors(hints, {"h.0.attn": Precision.INT4, "h.0.experts": Precision.INT5})
    floors = {name: hint.floor for name, hint in raised.blocks.items()}
    assert floors == {
        "h.0.attn": Precision.INT6,
        "h.0.experts.0": Precision.INT5,
        "h.0.experts.1": Precision.INT8,
    }
    assert most_precise([]) is None
