"""The veto: the one place through which every plan, and so every transition, passes beforehand.

    admitted  <=>  no block below its floor,  sum of bounds and kernels <= epsilon,  each tier
                   within its budget,  and an order of moves in which it stays there on the way

with floors, bounds and epsilon from the ledger (``lib/precision/floors``). A change of one block is
a plan that differs in one. What ``judge`` returns are the moves that the runtime carries out:
nothing else moves a block. What was asked, what it would have cost, the limit and the reason go to
the audit log, accepted or not. A measurement can only take away: it raises floors, never lowers
one.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..errors import PlacementError
from ..precision.floors import BELOW_THREE_BITS, JointCheck, Ledger, tighten
from ..vocabulary import Precision, Tier, is_below
from .audit import WHOLE_PLAN, Audit, Record, Rule
from .moves import NoRoom, order_moves
from .plan import Placement, Plan

_ROUNDING_NATS = 1e-6
"""A KL of what is equal may come out below 0 by so much."""
_BEYOND = 1e30
"""The factor on bounds that leaves nothing compressed within any epsilon."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """KL of the model as it runs against the full one, in nats per token, and its upper bound."""

    kl_nats: float
    upper_nats: float


Measure = Callable[[], Measured]
"""Runs the model on held-out text, as ``lib.precision.quality`` does."""


class Veto:
    """Judges plans by a ledger, and remembers which one is held.

    Before the first nothing is held. Not for several threads at once.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.audit = Audit()
        self.num_raised = 0
        """How often a measurement raised floors."""
        self._plan: Plan | None = None

    @property
    def bound_nats(self) -> float:
        """The sum of bounds of what is held, kernels included: at most epsilon, until a measurement
        raises bounds.
        """
        return self._sum_bounds(self._plan) if self._plan is not None else 0.0

    @property
    def predicted_nats(self) -> float | None:
        """The predicted KL of what is held; None where a block has no prediction."""
        return self._sum_predicted(self._plan) if self._plan is not None else 0.0

    # -- plans -------------------------------------------------------------------------------------

    def judge(self, plan: Plan) -> tuple[str, ...]:
        """Return the blocks that have to move for a plan, in an order that keeps the budgets.

        Raises PlacementError with what the plan breaks, before anything moves.
        """
        rejected = [
            record
            for name, place in plan.placements.items()
            if not (record := self._judge_block(name, place)).accepted
        ]
        rejected += self._judge_sums(plan)
        moves: tuple[str, ...] = ()
        if not rejected:
            try:
                moves = order_moves(self._plan, plan)
            except NoRoom as stuck:
                rejected.append(self._refuse_move(plan, stuck))
        if rejected:
            for record in rejected:
                self.audit.add(record)
            more = f" (and {len(rejected) - 1} more)" if len(rejected) > 1 else ""
            raise PlacementError(
                f"the veto refuses the plan: {_name(rejected[0])}{rejected[0].reason}{more}; "
                "runtime.audit has every reason"
            )
        for name in moves:
            self.audit.add(self._judge_block(name, plan.placements[name]))
        return moves

    def adopt(self, plan: Plan | None) -> None:
        """Note that a plan was carried out; None: what is held is unknown, so all has to move."""
        self._plan = plan

    # -- measurements ------------------------------------------------------------------------------

    def judge_measured(self, measured: Measured) -> Record:
        """Compare what was measured with epsilon, and raise floors where it is above.

        A pending joint check holds the upper bound to epsilon; once that has passed, or where none
        was needed, a measurement counts against the plan only if its value itself is above, since
        that of a few sequences is uncertain. A value that isn't a KL (not finite, or below 0 by
        more than rounding) admits nothing compressed. What is held may be below its floor
        afterwards (``below_floors``).
        """
        pending = self.ledger.joint_check is JointCheck.PENDING
        value = measured.upper_nats if pending else measured.kl_nats
        limit = self.ledger.epsilon
        is_kl = all(
            math.isfinite(nats) and nats > -_ROUNDING_NATS
            for nats in (measured.kl_nats, measured.upper_nats)
        )
        accepted = is_kl and value <= limit
        what = "upper bound of the measured KL" if pending else "measured KL"
        verdict = "within" if accepted else "above" if is_kl else "no KL, which is above"
        reason = f"{what} {value:.4g} is {verdict} epsilon {limit:.4g} nats per token"
        if accepted and pending:
            self.ledger = replace(
                self.ledger,
                joint_check=JointCheck.PASSED,
                floors={**self.ledger.floors, **self._precisions()},  # no lower than was measured
            )
        elif not accepted and self.bound_nats > 0:
            kernels = self.ledger.kernel_nats  # no factor applies to these
            excess = max(measured.upper_nats, value) - kernels
            ratio = excess / (self.bound_nats - kernels) if is_kl else _BEYOND
            raised = tighten(self.ledger, ratio=max(ratio, 1.0))
            self.ledger = replace(raised, joint_check=JointCheck.PENDING) if pending else raised
            self.num_raised += 1
            reason += (
                f": bounds grow {ratio:.3g} times, {len(self.below_floors())} blocks are below "
                "their floors"
            )
        elif not accepted:
            reason += ": every block is lossless, so the measurement is of something else"
        return self.audit.add(
            Record(
                block=WHOLE_PLAN,
                asked="measurement",
                accepted=accepted,
                predicted=_finite(value),
                limit=_finite(limit),
                broken=None if accepted else Rule.MEASURED,
                reason=reason,
            )
        )

    def below_floors(self) -> list[str]:
        """Name the blocks that are held below their floors, since those were raised."""
        floors = self.ledger.floors
        return [
            name
            for name, precision in self._precisions().items()
            if name in floors and is_below(precision, floors[name])
        ]

    @property
    def is_bounded(self) -> bool:
        """There is an epsilon."""
        return math.isfinite(self.ledger.epsilon)

    def to_json(self, plan: Plan | None = None) -> dict[str, Any]:
        """Return epsilon, what a plan (None: what is held) takes of it, and the log's counts."""
        predicted, bound = self.predicted_nats, self.bound_nats
        if plan is not None:
            predicted, bound = self._sum_predicted(plan), self._sum_bounds(plan)
        return {
            "epsilon_nats": _finite(self.ledger.epsilon),
            "predicted_nats": predicted,
            "bound_nats": bound if self.is_bounded else None,
            "factor": self.ledger.factor,
            "kernel_nats": self.ledger.kernel_nats,
            "kl_per_byte": self.ledger.exchange_rate,
            "gap": self.ledger.gap,
            "joint_check": str(self.ledger.joint_check),
            "floors_raised": self.num_raised,
            "records": self.audit.count,
            "rejections": len(self.audit.rejections),
        }

    # -- the rules ---------------------------------------------------------------------------------

    def _judge_block(self, block: str, place: Placement) -> Record:
        """Judge a block's precision by itself."""
        ledger, precision, reason = self.ledger, place.precision, place.reason
        floor, bound = ledger.floors.get(block), ledger.bound(block, precision)
        limited = math.isfinite(ledger.epsilon)
        limit, broken = _finite(ledger.epsilon), None
        if floor is not None and is_below(precision, floor):
            limit, broken = ledger.bound(block, floor) if limited else None, Rule.FLOOR
            reason = f"{precision} is below the floor {floor}" + (f" ({reason})" if reason else "")
        elif limited and bound is None:
            limit, broken = None, Rule.NO_PREDICTION
            reason = f"nothing predicts what {precision} would cost: lossless is allowed"
        elif limited and self._needs_joint_check(block, precision):
            broken = Rule.JOINT_CHECK
            reason = f"{precision} is below 3 bits, and all blocks together were not measured"
        return Record(
            block=block,
            asked=f"{precision} {self._change(block, place)}",
            accepted=broken is None,
            predicted=bound if limited else ledger.predicted(block, precision),
            limit=limit,
            broken=broken,
            reason=reason,
        )

    def _needs_joint_check(self, block: str, precision: Precision) -> bool:
        return (
            precision in BELOW_THREE_BITS
            and is_below(precision, self.ledger.curves[block].native)
            and self.ledger.joint_check is JointCheck.MISSING
        )

    def _judge_sums(self, plan: Plan) -> Iterator[Record]:
        """Yield a record for epsilon and for each tier that the plan as a whole passes."""
        total, epsilon = self._sum_bounds(plan), self.ledger.epsilon
        if total > epsilon:
            reason = f"bounds of {total:.4g} would pass epsilon {epsilon:.4g} nats per token"
            yield _refuse(WHOLE_PLAN, "plan", Rule.EPSILON, total, epsilon, reason)
        sizes = plan.bytes_per_tier()
        sizes[Tier.HBM] = plan.fast_bytes
        sizes[Tier.SSD] = sizes.get(Tier.SSD, 0) + plan.original_bytes
        for tier, size in sizes.items():
            limit = plan.limit(tier)
            if limit is not None and size > limit:
                reason = f"{size} bytes would pass the budget of {limit} for {tier}"
                yield _refuse(WHOLE_PLAN, "plan", Rule.BUDGET, size, limit, reason)

    def _refuse_move(self, plan: Plan, stuck: NoRoom) -> Record:
        place = plan.placements[stuck.block]
        asked = f"{place.precision} {self._change(stuck.block, place)}"
        reason = (
            f"on its way {stuck.num_bytes} bytes would pass the budget of {stuck.limit} for "
            f"{stuck.tier}, and no order of moves was found in which something leaves before: go "
            "there by way of a larger budget"
        )
        return _refuse(stuck.block, asked, Rule.BUDGET, stuck.num_bytes, stuck.limit, reason)

    def _change(self, block: str, place: Placement) -> str:
        """Return the state that a block has and the one it is to have; which way it goes is told by
        what executes it (``Runtime.transitions``).
        """
        if self._plan is None:
            return str(place.state)
        held = self._plan.placements[block]
        if (held.state, held.precision) == (place.state, place.precision):
            return str(held.state)
        return f"{held.state} -> {place.state}"

    def _precisions(self) -> dict[str, Precision]:
        placements = self._plan.placements if self._plan is not None else {}
        return {name: place.precision for name, place in placements.items()}

    def _sum_predicted(self, plan: Plan) -> float | None:
        """Return the predicted KL of all blocks; None where one has no prediction."""
        values = [
            self.ledger.predicted(name, place.precision) for name, place in plan.placements.items()
        ]
        known = [value for value in values if value is not None]
        return math.fsum(known) if len(known) == len(values) else None

    def _sum_bounds(self, plan: Plan) -> float:
        """Return the bounds of all blocks and, if any is compressed, what kernels cost."""
        total = math.fsum(
            self.ledger.bound(name, place.precision) or 0.0
            for name, place in plan.placements.items()
        )
        return total + self.ledger.kernel_nats if total else 0.0


def _refuse(
    block: str, asked: str, broken: Rule, value: float, limit: float, reason: str
) -> Record:
    return Record(
        block=block,
        asked=asked,
        accepted=False,
        predicted=value,
        limit=limit,
        broken=broken,
        reason=reason,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _name(record: Record) -> str:
    return "" if record.block == WHOLE_PLAN else f"block {record.block!r}: "
