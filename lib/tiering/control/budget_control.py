"""A budget that changes while the model runs: the controller around a runtime.

An operator asks (``request``, or another process through the control file); the pure core decides
(``policy.control``); what it decides is judged by the veto and carried out before the next module
begins, by the thread that runs the model (``hooks.requests``). Precisions stay, so outputs do.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...errors import InputError, PlacementError
from ...policy.control import Controller, Settings
from ...policy.events import (
    Asked,
    BlockFacts,
    Decision,
    Facts,
    Failed,
    Held,
    MemoryHint,
    Move,
    Observation,
    Refuse,
    Replan,
    Tick,
)
from ...policy.plan import Plan, Step
from ...policy.planner.moved import describe_blocks, move_blocks
from ...policy.planner.problem import Problem
from ...units import parse_bytes
from ...vocabulary import Tier
from ..keeper import PlanKeeper
from .changes import Change
from .file import ControlFile
from .log import DIGEST_EVERY, ControlLog
from .observe import Observer
from .watcher import Watcher

_KEPT_CHANGES = 10_000


class BudgetControl:
    """Keeps a runtime within a budget that others may change at any time, from any thread.

    ``Runtime.control`` makes one. ``file``: a control file to watch; ``log``: where observations
    and decisions are written, for ``tierhints replay``; ``reserve``: memory of the system, or of
    the accelerator, that is to stay free (None: that isn't looked at).
    """

    def __init__(
        self,
        keeper: PlanKeeper,
        *,
        settings: Settings | None = None,
        file: str | Path | None = None,
        log: str | Path | None = None,
        reserve: str | int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if not keeper.plan.budget:
            raise InputError("there is no budget to control: attach with budget=")
        self.controller = Controller(settings)
        self.changes: deque[Change] = deque(maxlen=_KEPT_CHANGES)
        """The latest, oldest first."""
        self.seconds = 0.0
        """What observing and deciding has taken of a core; carrying out is not in it."""
        self._keeper = keeper
        self._requests = keeper.forwards.requests
        self._clock = clock
        self._began_at = clock()
        self._plan: Plan | None = None
        self._waited = (0.0, 0.0)
        self._known: tuple[tuple[object, ...], Problem] | None = None
        """The latest problem, and what it was made from."""
        self._blocks: tuple[BlockFacts, ...] = ()
        watched = None if file is None else ControlFile(file)
        reserve_bytes = None if reserve is None else parse_bytes(reserve)
        self._log: ControlLog | None = None
        if log is not None:
            tiers = self._problem().tiers
            self._log = ControlLog(log, self.controller.settings, tiers)
        self._requests.do(self._begin)
        self.observer = Observer(keeper, clock())
        """What the runtime did, and what the system has left, twice a second."""
        self._watcher = Watcher(
            self, self.observer, file=watched, reserve_bytes=reserve_bytes, clock=clock
        )

    def request(self, size: str | int | None) -> Decision | None:
        """Ask for another budget of fast memory: a size, or None for no limit. From any thread.

        A smaller one is kept when this returns; more is used after the dwell, step by step. Returns
        what was decided. Raises InputError for a budget below the smallest that works, and
        PlacementError where it can't be carried out: nothing has changed then.
        """
        limit = None if size is None else parse_bytes(size)
        asked_at = self._clock()
        return self._requests.do(lambda: self._ask(limit, asked_at))

    def hint(self, missing_bytes: int) -> bool:
        """Say how much memory is missing in the system until its reserve is free again (negative:
        how much more is free). Returns whether less is taken for it now.
        """
        asked_at = self._clock()
        self._requests.do(lambda: self._heed(missing_bytes, asked_at))
        return self.controller.is_squeezed

    def status(self) -> dict[str, Any]:
        """Return what is held and allowed now, in plain JSON types."""
        controller, plan, veto = self.controller, self._keeper.plan, self._keeper.veto
        states = Counter(map(str, self._keeper.residency.states().values()))
        return {
            "limit_bytes": controller.limit_bytes,
            "asked_bytes": controller.asked_bytes,
            "floor_bytes": controller.floor_bytes,
            "fast_bytes": plan.fast_bytes,
            "bytes_per_tier": {str(tier): size for tier, size in plan.bytes_per_tier().items()},
            "states": dict(sorted(states.items())),
            "refusals": len(veto.audit.rejections),
            "changes": len(self.changes),
            "last_change": asdict(self.changes[-1]) if self.changes else None,
        }

    def stop(self) -> None:
        """End the thread and the log; the budget stays as it is."""
        self._watcher.stop()
        if self._log is not None:
            self._log.close()

    def tick(self) -> None:
        """Let time pass for the controller, where something may come of it."""
        if self._time_us() >= self.controller.grows_at_us and self.controller.wants_ticks:
            now = self._clock()
            self._requests.do(lambda: self._tick(now))

    # -- where nothing computes ------------------------------------------------------------------

    def _begin(self) -> None:
        """Keep a copy below of what may leave, so that leaving is quick; and look around."""
        problem = self._observe_facts()
        for tier, limit in problem.below:
            if limit is None:
                self._keeper.residency.back_up(tier)
                break

    def _ask(self, limit: int | None, asked_at: float) -> Decision | None:
        problem = self._observe_facts()
        return self._decide(problem, asked_at, Asked, limit_bytes=limit)

    def _heed(self, missing: int, asked_at: float) -> None:
        self._decide(self._observe_facts(), asked_at, MemoryHint, missing_bytes=missing)

    def _tick(self, asked_at: float) -> None:
        problem = self._observe_facts()
        self._decide(problem, asked_at, Tick, waited_share=self._waited_share())

    def _decide(
        self, problem: Problem, asked_at: float, kind: type[Observation], **values: Any
    ) -> Decision | None:
        """Observe something, and carry out what is decided."""
        began = time.thread_time()
        decision = self._observe(kind, **values)
        self.seconds += time.thread_time() - began
        if isinstance(decision, Refuse):
            self._make_plan(decision.limit_bytes)  # says which budget works
        if not isinstance(decision, Move | Replan):
            return decision
        began_at = self._clock()
        try:
            self._carry_out(problem, decision)
        except BaseException as error:
            self._observe(Failed, reason=str(error))
            raise
        self._observe_held(decided=True)
        moves = decision if isinstance(decision, Move) else None
        self.changes.append(
            Change(
                asked_at=asked_at,
                began_at=began_at,
                ended_at=self._clock(),
                reason=decision.reason,
                demoted=() if moves is None else tuple(name for name, _ in moves.demote),
                promoted=() if moves is None else moves.promote,
                limit_bytes=decision.limit_bytes,
                fast_bytes=self._keeper.plan.fast_bytes,
                resident_bytes=self._keeper.recorder.resident_bytes,
            )
        )
        return decision

    def _carry_out(self, problem: Problem, decision: Move | Replan) -> None:
        keeper = self._keeper
        if isinstance(decision, Move):
            try:
                keeper.carry_out(move_blocks(problem, keeper.plan, decision))
                return
            except PlacementError:
                if not decision.demote or keeper.broken is not None:
                    raise
        keeper.carry_out(self._make_plan(decision.limit_bytes))

    def _make_plan(self, limit: int | None) -> Plan:
        keeper = self._keeper
        budget = {**keeper.budget, str(Tier.HBM): limit}
        return keeper.planning.make_plan(budget, self._schedule)

    @property
    def _schedule(self) -> tuple[Step, ...]:
        forwards = self._keeper.forwards
        return forwards.expected if forwards.is_mine else forwards.schedule

    # -- observations ----------------------------------------------------------------------------

    def _observe_facts(self) -> Problem:
        """See to it that the controller knows what there is and what is held now."""
        began, keeper = time.thread_time(), self._keeper
        problem, blocks = self._problem(), self._blocks
        if _sizes(blocks) != _sizes(self.controller.holding.blocks.values()):
            self._observe(
                Facts,
                blocks=blocks,
                floor_bytes=self._smallest(problem),
                scratch_bytes=keeper.plan.scratch_bytes,
                below=tuple(problem.below),
                replans=any(need.routed for need in keeper.planning.needs),
            )
        if self._plan is not keeper.plan:
            self._observe_held(decided=False)
        self.seconds += time.thread_time() - began
        return problem

    def _smallest(self, problem: Problem) -> int:
        planning = self._keeper.planning
        if any(need.routed for need in planning.needs):
            return planning.smallest_budget(self._keeper.plan.budget, self._schedule)
        return min(layout.smallest_bytes for layout in problem.layouts)

    def _problem(self) -> Problem:
        """Return what the planner chooses among; made anew where something of it has changed."""
        planning, schedule = self._keeper.planning, self._keeper.forwards.schedule
        budget = self._keeper.plan.budget
        below = {tier: size for tier, size in budget.items() if tier is not Tier.HBM}
        key = (planning.needs, planning.casts, schedule, below)
        if self._known is None or self._known[0] != key:
            problem = planning.problem(budget, schedule)
            self._known, self._blocks = (key, problem), describe_blocks(problem)
        return self._known[1]

    def _observe_held(self, *, decided: bool) -> None:
        plan = self._plan = self._keeper.plan
        self._observe(
            Held,
            tiers=tuple(plan.placements[name].tier for name in self.controller.holding.blocks),
            num_slots=plan.num_slots,
            slot_bytes=plan.slot_bytes,
            limit_bytes=plan.limit(Tier.HBM),
            decided=decided,
            cache_bytes=plan.cache_bytes,
        )

    def _observe(self, kind: type[Observation], **values: Any) -> Decision | None:
        controller = self.controller
        sequence = controller.sequence + 1
        observation = kind(sequence=sequence, time_us=self._time_us(), **values)
        decision = controller.observe(observation)
        if self._log is not None:
            digest = controller.digest() if sequence % DIGEST_EVERY == 0 else None
            self._log.add(observation, decision, digest)
        return decision

    def _time_us(self) -> int:
        return round((self._clock() - self._began_at) * 1e6)

    def _waited_share(self) -> float:
        """Return the share of the transfers since the last tick that was waited for."""
        recorder = self._keeper.recorder
        recorder.link_seconds += self._keeper.memory.transport.take_link_seconds()
        waited = sum(block.transfer_seconds for block in recorder.blocks.values())
        before, self._waited = self._waited, (waited, recorder.link_seconds)
        link = self._waited[1] - before[1]
        return (waited - before[0]) / link if link > 0 else 1.0


def _sizes(blocks: Iterable[BlockFacts]) -> list[tuple[object, ...]]:
    """Return what counts of facts: in which order a forward came by doesn't."""
    return [
        (each.name, each.resident_bytes, each.stored_bytes, each.must_reside, len(each.places))
        for each in blocks
    ]
