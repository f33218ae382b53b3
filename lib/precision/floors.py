"""From one declared number to what every block may cost: the ledger of bounds, and the floors.

epsilon is what the weights' precision may cost altogether, as KL(full model || reduced one) in nats
per token. Where a model is calibrated on a text, its perplexity there grows by the factor exp(KL),
so a ratio of perplexities is another way to say it: epsilon = ln(ratio).

The bound of a block at a precision is its predicted KL times the conformal factor c (an upper
tolerance limit of measured over predicted, from random probes; ``tierhints calibrate``).
Kernels that compute with compressed weights round more than the weights: what that costs, measured
for the whole model, is set aside before anything is shared out. A block's share of epsilon is what
the allocation of fewest bytes with sum of bounds <= epsilon gives it: at its multiplier a nat buys
the same number of bytes in every block, so no other shares save more. The floor is the least
precision whose bound stays within the share. The shares add up to at most epsilon, so whatever
keeps every floor keeps epsilon too.

Below 3 bits KL is no longer additive over blocks, so bounds alone don't admit it there: a measured
check of all blocks together has to come first (``Ledger.joint_check``).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from ..errors import InputError
from ..hints import BlockHint, Hints
from ..vocabulary import Precision, is_below, most_precise
from .allocate import Option, allocate_precisions
from .tolerance import LEAST_PROBES

LARGEST_EPSILON = 4.0
"""Nats per token: the perplexity is 55 times what it was."""
_UNIT = 2.0**-50
"""Bounds are multiples of it, rounded up: sums below 8 nats are then exact, in any order."""
BELOW_THREE_BITS = frozenset({Precision.INT2})
_FOREIGN_KERNELS = 100
"""Kernels that weren't measured may cost a few times as much as those that were: a few per cent of
an epsilon that is so many times what these cost."""
_FOREIGN_NATS = 0.01
"""Epsilon from which kernels that weren't measured are let pass at all: activations and results in
bfloat16 have cost 0.0009 nats (SmolLM2-135M), and those that were measured may round less."""


class JointCheck(StrEnum):
    """Whether all blocks together were measured, as precisions below 3 bits demand."""

    MISSING = "missing"
    """Nothing was measured: below 3 bits is refused."""
    PENDING = "pending"
    """It is admitted so that it can be measured, which comes next."""
    PASSED = "passed"
    """The upper bound of the measured KL is within epsilon."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """How far predictions can be trusted: bounds are ``factor`` times as high, and whatever is
    compressed costs ``kernel_nats`` more, where the kernels named ``kernels`` compute.
    """

    factor: float
    kernel_nats: float
    kernels: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """What a block costs at each precision below its own, ``native``, which is lossless.

    ``kl_nats``: predicted; ``cost``: as for ``allocate_precisions``, of these precisions and of
    ``native``. ``lowest``: a floor that is there already, such as the hints'.
    """

    native: Precision
    kl_nats: Mapping[Precision, float]
    cost: Mapping[Precision, float]
    lowest: Precision | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """Bounds and floors of all blocks under one epsilon (infinite: none was declared).

    ``floors``: a block that is not in it has no floor. ``factor``: bound over prediction.
    ``kernel_nats``: what kernels cost as soon as any block is compressed. ``exchange_rate``: the KL
    bound that a byte is worth where epsilon ends. ``gap``: how far the floors may be from the
    fewest bytes, relatively.
    """

    epsilon: float
    factor: float
    curves: Mapping[str, Curve]
    floors: Mapping[str, Precision]
    exchange_rate: float
    gap: float
    joint_check: JointCheck
    kernel_nats: float = 0.0

    def predicted(self, block: str, precision: Precision) -> float | None:
        """Return the predicted KL of a block at a precision, in nats per token; None: unknown."""
        curve = self.curves[block]
        return 0.0 if not is_below(precision, curve.native) else curve.kl_nats.get(precision)

    def bound(self, block: str, precision: Precision) -> float | None:
        """Return the upper bound of that KL; None: unknown. No less precise one has a lower
        bound.
        """
        return _bound(self.curves[block], precision, self.factor)


def parse_epsilon(value: float | str, *, name: str = "epsilon") -> float:
    """Read a quality bound: nats per token (``0.02``), or a perplexity ratio (``"ppl=1.02"``).

    ``name`` is what the error calls it; raises InputError.
    """
    text = str(value).strip()
    kind, equals, number = text.rpartition("=")
    try:
        parsed = float(number)
    except ValueError:
        parsed = math.nan
    is_ratio = bool(equals) and kind.strip().lower() == "ppl"
    epsilon = math.log(parsed) if is_ratio and parsed > 0 else parsed
    if (equals and not is_ratio) or not 0 < epsilon <= LARGEST_EPSILON:
        raise InputError(
            f"{name} {text!r} is not a quality bound: give nats per token above 0 and at most "
            f"{LARGEST_EPSILON:g} (0.02), or the factor by which perplexity may grow (ppl=1.02)"
        )
    return epsilon


def read_trust(quality: Mapping[str, Any]) -> Trust:
    """Return what hints say of their own accuracy.

    Raises InputError where they were not calibrated, or on too few probes though there are more.
    """
    fix = "run tierhints calibrate --model ... --tier-hints ... first"
    factor, kernels = quality.get("conformal_factor"), quality.get("kernels")
    if quality.get("calibrated") is not True or not isinstance(factor, int | float) or factor <= 0:
        raise InputError(
            "epsilon needs predictions of KL that were checked against measurements, and these "
            f"hints have none: {fix}"
        )
    probes = quality.get("conformal_probes", 0)
    if quality.get("exhaustive") is not True and probes < LEAST_PROBES:
        raise InputError(
            f"the safety factor of these hints comes from {probes} probes, which say little of "
            f"other pairs of block and precision: epsilon needs {LEAST_PROBES}, or all pairs that "
            f"the model has; {fix}"
        )
    if not isinstance(kernels, Mapping):
        raise InputError(
            f"these hints don't say what kernels cost beyond the weights' error, as epsilon needs: "
            f"{fix}"
        )
    return Trust(
        factor=float(factor), kernel_nats=float(kernels["nats"]), kernels=str(kernels["name"])
    )


def check_kernels(trust: Trust, kernels: str, *, epsilon: float) -> None:
    """Raise InputError where other kernels compute than those measured and epsilon is so small that
    the difference may count.
    """
    smallest = max(_FOREIGN_KERNELS * trust.kernel_nats, _FOREIGN_NATS)
    if kernels != trust.kernels and epsilon < smallest:
        raise InputError(
            f"epsilon {epsilon:.4g} is near to what kernels cost by themselves: "
            f"{trust.kernel_nats:.2g} nats where these hints were calibrated ({trust.kernels}), "
            f"unknown here ({kernels}); run tierhints calibrate here, give measure=, or an "
            f"epsilon of at least {smallest:.2g}"
        )


def make_ledger(
    curves: Mapping[str, Curve],
    *,
    epsilon: float,
    factor: float,
    kernel_nats: float = 0.0,
    joint_check: JointCheck = JointCheck.MISSING,
) -> Ledger:
    """Share epsilon out, less what kernels cost. A precision without a prediction, or below a
    block's ``lowest``, is never allowed; nor is one below 3 bits without a joint check.
    """
    options: dict[str, list[Option]] = {}
    for name, curve in curves.items():
        options[name] = [Option(curve.native, curve.cost[curve.native], 0.0)]
        for precision in curve.kl_nats:
            bound = _bound(curve, precision, factor)
            allowed = (
                is_below(precision, curve.native)
                and not (curve.lowest is not None and is_below(precision, curve.lowest))
                and not (precision in BELOW_THREE_BITS and joint_check is JointCheck.MISSING)
            )
            if allowed and bound is not None:
                options[name].append(Option(precision, curve.cost[precision], bound))
    kernel_nats = _round_up(kernel_nats)
    allocation = allocate_precisions(options, kl_budget=max(epsilon - kernel_nats, 0.0))
    return Ledger(
        epsilon=epsilon,
        factor=factor,
        curves=dict(curves),
        floors=allocation.precisions,
        exchange_rate=allocation.exchange_rate,
        gap=allocation.gap,
        joint_check=joint_check,
        kernel_nats=kernel_nats,
    )


def open_ledger(curves: Mapping[str, Curve]) -> Ledger:
    """Return the ledger of a model without epsilon: the floors that the hints name, and no more."""
    floors = {
        name: curve.native if is_below(curve.native, curve.lowest) else curve.lowest
        for name, curve in curves.items()
        if curve.lowest is not None
    }
    return Ledger(
        epsilon=math.inf,
        factor=1.0,
        curves=dict(curves),
        floors=floors,
        exchange_rate=0.0,
        gap=0.0,
        joint_check=JointCheck.MISSING,
    )


def tighten(ledger: Ledger, *, ratio: float) -> Ledger:
    """Return the ledger with bounds ``ratio`` times as high and the floors that follow, none lower
    than before; for what was measured to be worse than its bounds. Below 3 bits is out then.
    """
    assert ratio >= 1
    curves = {
        name: replace(curve, lowest=ledger.floors.get(name, curve.lowest))
        for name, curve in ledger.curves.items()
    }
    return make_ledger(
        curves,
        epsilon=ledger.epsilon,
        factor=ledger.factor * ratio,
        kernel_nats=ledger.kernel_nats,
    )


def merge_curves(hints: Sequence[BlockHint]) -> tuple[dict[Precision, float], Precision | None]:
    """Return the summed KL curve and the highest floor of blocks that are held as one.

    A precision that one of them has no prediction for is left out.
    """
    known = set(Precision).intersection(*(hint.kl for hint in hints)) if hints else set()
    kl_nats = {
        precision: math.fsum(hint.kl[precision] for hint in hints)
        for precision in Precision
        if precision in known
    }
    floors = [hint.floor for hint in hints if hint.floor is not None]
    return kl_nats, most_precise(floors)


def raise_floors(hints: Hints, floors: Mapping[str, Precision]) -> Hints:
    """Return hints in which no floor is lower than the given ones.

    A name of ``floors`` may be that of packed experts; the floor is then that of each expert.
    """
    blocks = {}
    for name, hint in hints.blocks.items():
        asked = [floors[key] for key in (name, name.rpartition(".")[0]) if key in floors]
        asked += [hint.floor] if hint.floor is not None else []
        blocks[name] = replace(hint, floor=most_precise(asked))
    return replace(hints, blocks=blocks)


def _bound(curve: Curve, precision: Precision, factor: float) -> float | None:
    if not is_below(precision, curve.native):
        return 0.0
    if precision not in curve.kl_nats:
        return None
    worst = max(kl for other, kl in curve.kl_nats.items() if not is_below(other, precision))
    # Never 0: weights that a precision happens to hold exactly still meet its kernels.
    return max(_round_up(worst * factor), _UNIT)


def _round_up(nats: float) -> float:
    return math.ceil(nats / _UNIT) * _UNIT
