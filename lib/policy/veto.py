"""The veto: the one place through which every plan and every transition passes before it happens.

    admitted  <=>  no block below its floor,  sum of bounds <= epsilon,  each tier within its budget

with floors, bounds and epsilon from the ledger (``lib/precision/floors``). The sum is kept, so a
transition is judged in constant time; it is exact, since bounds are multiples of one power of two.
What was asked, what it would have cost, the limit and the reason go to the audit log, accepted or
not. A measurement can only take away: it raises floors, never lowers one.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from ..errors import InputError, PlacementError
from ..hints import Precision, Tier
from ..precision.floors import BELOW_THREE_BITS, JointCheck, Ledger, is_below, tighten
from .audit import WHOLE_PLAN, Audit, Record, Rule
from .plan import Plan
from .states import State, Transition, find_path

_RESIDENT = frozenset({State.FULL, State.REDUCED, State.COMPRESSED})


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """KL of the model as it runs against the full one, in nats per token, and its upper bound."""

    kl_nats: float
    upper_nats: float


Measure = Callable[[], Measured]
"""Runs the model on held-out text, as ``lib.precision.quality`` does."""


@dataclass(frozen=True, slots=True)
class _Held:
    state: State
    precision: Precision


class Veto:
    """Judges plans and transitions by a ledger, and remembers what is held.

    Before the first plan nothing is held, and every block counts as lossless. Not for several
    threads at once.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.audit = Audit()
        self._held: dict[str, _Held] = {}
        self._bound_nats = 0.0

    @property
    def bound_nats(self) -> float:
        """The sum of bounds of what is held: at most epsilon."""
        return self._bound_nats

    @property
    def predicted_nats(self) -> float | None:
        """The predicted KL of what is held; None where a block has no prediction."""
        values = [self.ledger.predicted(name, held.precision) for name, held in self._held.items()]
        known = [value for value in values if value is not None]
        return math.fsum(known) if len(known) == len(values) else None

    # -- transitions -------------------------------------------------------------------------------

    def check(self, block: str, precision: Precision, state: State, *, reason: str) -> Record:
        """Judge one block's change against what is held now; nothing changes but the log."""
        if block not in self.ledger.curves:
            raise InputError(f"{block!r} is no block of this plan")
        held = self._held.get(block)
        others = self._bound_nats - (self._bound_of(block, held.precision) if held else 0.0)
        return self.audit.add(self._judge(block, precision, state, reason, others))

    def move(self, block: str, precision: Precision, state: State, *, reason: str) -> Record:
        """Judge one block's change and, if it is accepted, note that it has happened."""
        record = self.check(block, precision, state, reason=reason)
        if record.accepted:
            self._hold(block, _Held(state, precision))
        return record

    # -- plans -------------------------------------------------------------------------------------

    def check_plan(self, plan: Plan) -> None:
        """Judge a whole plan; raises PlacementError with what it breaks, before anything moves."""
        rejected = []
        for name, place in plan.placements.items():
            record = self._judge(name, place.precision, place.state, place.reason, 0.0)
            if not record.accepted:
                rejected.append(self.audit.add(record))
            elif self._held.get(name) != _Held(place.state, place.precision):
                self.audit.add(record)
        rejected += [self.audit.add(record) for record in self._judge_sums(plan)]
        if rejected:
            more = f" (and {len(rejected) - 1} more)" if len(rejected) > 1 else ""
            raise PlacementError(
                f"the veto refuses the plan: {_name(rejected[0])}{rejected[0].reason}{more}; "
                "runtime.audit has every reason"
            )

    def adopt(self, plan: Plan) -> None:
        """Note that a plan was carried out."""
        for name, place in plan.placements.items():
            self._hold(name, _Held(place.state, place.precision))

    # -- measurements ------------------------------------------------------------------------------

    def judge_measured(self, measured: Measured) -> Record:
        """Compare what was measured with epsilon, and raise floors where it is above.

        A pending joint check holds the upper bound to epsilon; once that has passed, or where none
        was needed, a measurement counts against the plan only if its value itself is above, since
        that of a few sequences is uncertain. What is held may be below its floor afterwards
        (``check_held``).
        """
        pending = self.ledger.joint_check is JointCheck.PENDING
        value = measured.upper_nats if pending else measured.kl_nats
        limit = self.ledger.epsilon
        accepted = value <= limit
        what = "upper bound of the measured KL" if pending else "measured KL"
        verdict = "within" if accepted else "above"
        reason = f"{what} {value:.4g} is {verdict} epsilon {limit:.4g} nats per token"
        if accepted and pending:
            self.ledger = replace(self.ledger, joint_check=JointCheck.PASSED)
            self._close_floors()
        elif not accepted:
            if self._bound_nats > 0:
                ratio = max(measured.upper_nats, value) / self._bound_nats
                self.ledger = tighten(self.ledger, ratio=max(ratio, 1.0))
                self._bound_nats = math.fsum(
                    self._bound_of(name, held.precision) for name, held in self._held.items()
                )
                raised = sum(
                    is_below(held.precision, self.ledger.floors[name])
                    for name, held in self._held.items()
                )
                reason += f": bounds grow {ratio:.3g} times, {raised} blocks are below their floors"
            else:
                reason += ": every block is lossless, so the measurement is of something else"
        return self.audit.add(
            Record(
                block=WHOLE_PLAN,
                asked="measurement",
                accepted=accepted,
                predicted=value,
                limit=_finite(limit),
                broken=None if accepted else Rule.MEASURED,
                reason=reason,
            )
        )

    def check_held(self) -> list[str]:
        """Name the blocks that are held below their floors, since those were raised."""
        floors = self.ledger.floors
        return [
            name
            for name, held in self._held.items()
            if name in floors and is_below(held.precision, floors[name])
        ]

    def to_json(self) -> dict[str, Any]:
        """Return epsilon, what is held against it, and the counts of the log."""
        return {
            "epsilon_nats": _finite(self.ledger.epsilon),
            "predicted_nats": self.predicted_nats,
            "bound_nats": self._bound_nats if math.isfinite(self.ledger.epsilon) else None,
            "factor": self.ledger.factor,
            "kl_per_byte": self.ledger.exchange_rate,
            "gap": self.ledger.gap,
            "joint_check": str(self.ledger.joint_check),
            "records": self.audit.count,
            "rejections": len(self.audit.rejections),
        }

    # -- the rules ---------------------------------------------------------------------------------

    def _judge(
        self, block: str, precision: Precision, state: State, reason: str, others_nats: float
    ) -> Record:
        """Judge a block's precision, with the bounds of the others added up in ``others_nats``."""
        ledger = self.ledger
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
        elif (
            bound is not None
            and others_nats + bound > ledger.epsilon
            and not self._eases(block, bound)
        ):
            broken = Rule.EPSILON
            reason = (
                f"bounds of {others_nats + bound:.4g} would pass epsilon {ledger.epsilon:.4g} "
                "nats per token"
            )
        return Record(
            block=block,
            asked=f"{precision} {self._path(block, precision, state, reason)}",
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

    def _eases(self, block: str, bound_nats: float) -> bool:
        """Say whether a change lowers a sum that a measurement has put above epsilon."""
        held = self._held.get(block)
        return (
            held is not None
            and self._bound_nats > self.ledger.epsilon
            and bound_nats < self._bound_of(block, held.precision)
        )

    def _judge_sums(self, plan: Plan) -> Iterator[Record]:
        """Yield a record for epsilon and for each tier that the plan as a whole passes."""
        total = math.fsum(
            self._bound_of(name, place.precision) for name, place in plan.placements.items()
        )
        epsilon = self.ledger.epsilon
        if total > epsilon:
            reason = f"bounds of {total:.4g} would pass epsilon {epsilon:.4g} nats per token"
            yield _refuse_plan(Rule.EPSILON, total, epsilon, reason)
        for tier, size in {**plan.bytes_per_tier(), Tier.HBM: plan.fast_bytes}.items():
            limit = plan.budget.get(tier)
            if limit is not None and size > limit:
                reason = f"{size} bytes would pass the budget of {limit} for {tier}"
                yield _refuse_plan(Rule.BUDGET, size, limit, reason)

    def _path(self, block: str, precision: Precision, state: State, reason: str) -> str:
        """Return the states to go through, each change of them allowed."""
        held = self._held.get(block)
        if held is None:
            return str(state)
        path = find_path(held.state, state)
        gains = is_below(held.precision, precision)
        if gains and {held.state, state} <= _RESIDENT:  # precision that was dropped is below
            path = (held.state, State.STAGED, *find_path(State.STAGED, state)[1:])
        for before, after in pairwise(path):
            Transition(block=block, before=before, after=after, reason=reason)
        return " -> ".join(path)

    def _bound_of(self, block: str, precision: Precision) -> float:
        return self.ledger.bound(block, precision) or 0.0

    def _hold(self, block: str, held: _Held) -> None:
        before = self._held.get(block)
        self._bound_nats -= self._bound_of(block, before.precision) if before else 0.0
        self._held[block] = held
        self._bound_nats += self._bound_of(block, held.precision)

    def _close_floors(self) -> None:
        """Let nothing go below what was measured."""
        floors = dict(self.ledger.floors)
        floors |= {name: held.precision for name, held in self._held.items()}
        self.ledger = replace(self.ledger, floors=floors)


def _refuse_plan(broken: Rule, value: float, limit: float, reason: str) -> Record:
    return Record(
        block=WHOLE_PLAN,
        asked="plan",
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
