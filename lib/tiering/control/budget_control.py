"""A budget that changes while the model runs: the controller, and the thread that looks after it.

An operator asks (``request``, or another process through the control file); the pure core decides
(``policy.control``); what it decides is judged by the veto and carried out before the next module
begins, by the thread that runs the model (``hooks.requests``). Precisions stay, so outputs do.
"""

import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
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
from .file import ControlFile
from .log import DIGEST_EVERY, ControlLog

_POLL_SECONDS = 0.02
_TICK_SECONDS = 0.1
_KEPT_CHANGES = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A decision that was carried out. Seconds are of the clock given to ``BudgetControl``.

    ``asked_at``: when it was asked for, or decided; ``began_at``: when the model's thread came by;
    ``ended_at``: when the memory was given back. ``fast_bytes``: what is planned to be taken since,
    ``resident_bytes``: what was measured.
    """

    asked_at: float
    began_at: float
    ended_at: float
    reason: str
    demoted: tuple[str, ...]
    promoted: tuple[str, ...]
    limit_bytes: int | None
    fast_bytes: int
    resident_bytes: int

    @property
    def seconds(self) -> float:
        """From the wish to its end."""
        return self.ended_at - self.asked_at


class BudgetControl:
    """Keeps a runtime within a budget that others may change at any time, from any thread.

    ``Runtime.control`` makes one. ``file``: a control file to watch; ``log``: where observations
    and decisions are written, for ``tierhints replay``.
    """

    def __init__(
        self,
        keeper: PlanKeeper,
        *,
        settings: Settings | None = None,
        file: str | Path | None = None,
        log: str | Path | None = None,
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
        self._ticked_at = 0.0
        self._plan: Plan | None = None
        self._waited = (0.0, 0.0)
        self._file = None if file is None else ControlFile(file)
        self._log: ControlLog | None = None
        if log is not None:
            tiers = self._problem().tiers
            self._log = ControlLog(log, self.controller.settings, tiers)
        self._requests.do(self._begin)
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=_look_after,
            args=(weakref.ref(self), self._stop),
            daemon=True,
            name="tierhints-control",
        )
        self._finish = weakref.finalize(self, _end_thread, self._stop, self._thread)
        self._thread.start()

    def request(self, size: str | int | None) -> Decision | None:
        """Ask for another budget of fast memory: a size, or None for no limit. From any thread.

        A smaller one is kept when this returns; more is used after the dwell, step by step. Returns
        what was decided. Raises InputError for a budget below the smallest that works, and
        PlacementError where it can't be carried out: nothing has changed then.
        """
        limit = None if size is None else parse_bytes(size)
        asked_at = self._clock()
        return self._requests.do(lambda: self._ask(limit, asked_at))

    def hint(self, missing_bytes: int) -> None:
        """Say how much memory is missing in the system until its reserve is free again (negative:
        how much more is free).
        """
        asked_at = self._clock()
        self._requests.do(lambda: self._heed(missing_bytes, asked_at))

    def status(self) -> dict[str, Any]:
        """Return what is held and allowed now, in plain JSON types."""
        controller, plan = self.controller, self._keeper.plan
        return {
            "limit_bytes": controller.limit_bytes,
            "asked_bytes": controller.asked_bytes,
            "floor_bytes": controller.floor_bytes,
            "fast_bytes": plan.fast_bytes,
            "bytes_per_tier": {str(tier): size for tier, size in plan.bytes_per_tier().items()},
            "changes": len(self.changes),
            "last_change": asdict(self.changes[-1]) if self.changes else None,
        }

    def stop(self) -> None:
        """End the thread and the log; the budget stays as it is."""
        self._finish()
        if self._log is not None:
            self._log.close()

    # -- the thread ------------------------------------------------------------------------------

    def look(self) -> None:
        """Look at the control file, and let time pass for the controller."""
        if self._file is not None:
            asked = self._file.read_change()
            if asked is not False:
                self._answer(self._file, asked)
        now = self._clock()
        if now - self._ticked_at < _TICK_SECONDS:
            return
        self._ticked_at = now
        due = self._time_us() >= self.controller.grows_at_us
        if due and self.controller.wants_ticks:
            self._requests.do(lambda: self._tick(now))

    def _answer(self, file: ControlFile, asked: str | int | None | InputError) -> None:
        error: Exception | None = None
        try:
            if isinstance(asked, InputError):
                raise asked
            self.request(asked)
        except Exception as refusal:  # whoever has asked is in another process
            error = refusal
        request = None if isinstance(asked, InputError) else asked
        file.answer(
            {"request": request, "error": None if error is None else str(error), **self.status()}
        )

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
        problem = self._problem()
        blocks = describe_blocks(problem)
        if _sizes(blocks) != _sizes(self.controller.holding.blocks.values()):
            self._observe(
                Facts,
                blocks=blocks,
                floor_bytes=min(layout.smallest_bytes for layout in problem.layouts),
                scratch_bytes=keeper.plan.scratch_bytes,
                below=tuple(problem.below),
            )
        if self._plan is not keeper.plan:
            self._observe_held(decided=False)
        self.seconds += time.thread_time() - began
        return problem

    def _problem(self) -> Problem:
        keeper = self._keeper
        return keeper.planning.problem(keeper.plan.budget, keeper.forwards.schedule)

    def _observe_held(self, *, decided: bool) -> None:
        plan = self._plan = self._keeper.plan
        self._observe(
            Held,
            tiers=tuple(plan.placements[name].tier for name in self.controller.holding.blocks),
            num_slots=plan.num_slots,
            slot_bytes=plan.slot_bytes,
            limit_bytes=plan.limit(Tier.HBM),
            decided=decided,
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


def _look_after(control: "weakref.ref[BudgetControl]", stop: threading.Event) -> None:
    """Look at what has changed, until told to end or forgotten."""
    while not stop.wait(_POLL_SECONDS):
        there = control()
        if there is None:
            return
        try:
            there.look()
        except Exception as error:  # what was held before is held, and goes on
            warnings.warn(f"the controller could not act: {error}", RuntimeWarning, stacklevel=1)
        finally:
            del there


def _end_thread(stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    if thread is not threading.current_thread() and thread.is_alive():
        thread.join()
