"""The runtime: a model under a plan, as its user sees it.

Another budget, another emulated machine, a measurement of quality: each happens between forwards.
What forwards themselves bring about is in ``keeper``.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

from ..errors import InputError, PlacementError
from ..policy.audit import Audit, Record
from ..policy.control import Settings
from ..policy.plan import Plan
from ..policy.states import Transition
from ..policy.veto import Measure, Veto
from ..vocabulary import State
from .control.budget_control import BudgetControl
from .keeper import PlanKeeper
from .payload.layout import Payload
from .residency.stand_ins import plain_tensors
from .telemetry import Stats
from .transfer.emulation import EmulatedTime
from .transfer.specs import Clock, EmulationSpec


class Runtime:
    """A model under a plan; a context manager that detaches. Runs one forward at a time."""

    def __init__(self, keeper: PlanKeeper) -> None:
        charges = keeper.memory.charges
        self._emulated = charges if isinstance(charges, EmulatedTime) else None
        self.mode = "real" if self._emulated is None else "emulated"
        self._keeper = keeper
        self._forwards = keeper.forwards
        self._detached = False
        self._control: BudgetControl | None = None

    @property
    def plan(self) -> Plan:
        """Where each group of blocks is, and what that was predicted to cost."""
        return self._keeper.plan

    @property
    def veto(self) -> Veto:
        """Judges every plan before anything moves; knows floors, bounds and what is held."""
        return self._keeper.veto

    def __enter__(self) -> Self:
        """Return the runtime itself; it is attached already."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Detach."""
        self.detach()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse to be copied or pickled, alone or with what refers to it."""
        raise PlacementError(
            "a runtime can't be copied or pickled: detach it first, and attach to each copy of the "
            "model"
        )

    @property
    def budget(self) -> dict[str, int | None]:
        """The bytes that each tier may hold (None: no limit); empty where the hints alone decided.

        Setting it plans anew and moves what must move, without reloading the model: between
        forwards, or from another thread than the one that runs the model before its next module.
        Every block keeps its precision. Raises InputError for a budget that is too small (nothing
        has moved then), and PlacementError in a forward of the caller's own.
        """
        return self._keeper.budget

    @budget.setter
    def budget(self, budget: Mapping[str, str | int | None]) -> None:
        keeper, forwards = self._keeper, self._forwards

        def change() -> None:
            if self._detached:
                raise PlacementError("the budget can't be changed after detach: attach again")
            schedule = forwards.expected if forwards.is_mine else forwards.schedule
            keeper.carry_out(keeper.planning.make_plan(budget or {}, schedule))

        forwards.requests.do(change)

    def control(
        self,
        *,
        settings: Settings | None = None,
        file: str | Path | None = None,
        log: str | Path | None = None,
        reserve: str | int | None = None,
    ) -> BudgetControl:
        """Let a controller look after the budget from here on, until detach; returns it.

        Its ``request`` asks for another budget of fast memory while the model runs: less is kept to
        at once, more after a dwell (``settings``). ``file``: a control file, through which other
        processes ask. ``log``: what is observed and decided, for ``tierhints replay``. ``reserve``:
        memory of the system that is to stay free, a slow hint beside the budget. A controller that
        was there before ends. Raises InputError where there is no budget.
        """
        if self._detached:
            raise PlacementError("there is nothing to control after detach: attach again")
        self._end_control()
        self._control = BudgetControl(
            self._keeper, settings=settings, file=file, log=log, reserve=reserve
        )
        return self._control

    @contextlib.contextmanager
    def limited(self, budget: Mapping[str, str | int | None]) -> Iterator[Self]:
        """Run under another budget for a while; the plan before comes back.

        Raises PlacementError where its budget doesn't hold floors that a measurement has raised
        meanwhile: nothing runs then until a larger budget is set, or the model detached.
        """
        keeper = self._keeper
        before = keeper.plan, keeper.payloads
        self.budget = budget
        try:
            yield self
        except BaseException as error:
            try:
                self._return_to(*before)
            except Exception as failure:  # the first error is the one to see
                error.add_note(str(failure))
            raise
        self._return_to(*before)

    def states(self) -> dict[str, State]:
        """Return the state of each block at this moment, and of each tied copy (by the name of its
        parameter), which is held nowhere. From any thread.
        """
        return self._keeper.residency.states()

    def transitions(self, *, streamed: bool = False) -> list[Transition]:
        """Return the latest changes of state, as they were carried out: those of blocks that have
        changed their place for good, or those of blocks that come into slots and leave them again.
        """
        log = self._keeper.memory.transitions
        return log.streamed() if streamed else list(log)

    @property
    def clock(self) -> Clock:
        """How time passes: really, or added up."""
        return Clock.WALL if self._emulated is None else self._emulated.spec.clock

    @property
    def emulation(self) -> EmulationSpec | None:
        """The machine that emulated mode charges for; None in real mode.

        Setting it asks "what if" of the same plan on another machine, between forwards; what is on
        its way then still takes its time, so the forward after is not typical. Raises InputError
        for a machine that lacks a tier of the plan, in real mode, and for another clock.
        """
        return None if self._emulated is None else self._emulated.spec

    @emulation.setter
    def emulation(self, spec: EmulationSpec) -> None:
        with self._forwards.lock:
            if self._emulated is None:
                raise InputError("real mode emulates no machine: attach with mode='emulated'")
            if spec.clock is not self.clock:
                raise InputError(
                    f"the clock is {self.clock} since attach and can't become {spec.clock}: attach "
                    "again"
                )
            self._forwards.check_idle()
            spec.check(self.plan)
            self._emulated.spec = self._keeper.planning.emulation = spec

    @property
    def audit(self) -> Audit:
        """What was asked of the veto, and what it answered."""
        return self.veto.audit

    def check_quality(self, measure: Measure) -> Record:
        """Measure the KL of the model as it runs; while it is above epsilon, raise floors and hold
        the blocks that are below them more precisely, within the present budget.

        ``measure`` runs forwards on held-out text. Returns the record of the last measurement, one
        that epsilon admits. Raises PlacementError where the budget doesn't hold the raised floors,
        or the original weights can't be read: nothing runs then until a larger budget is set, or
        the model detached. And where all weights are lossless already and the KL is above epsilon
        all the same: it is of another model then, or another text encoding.
        """
        with self._forwards.lock:
            if self._detached:
                raise PlacementError("quality can't be measured after detach: attach again")
            if math.isinf(self.veto.ledger.epsilon):
                raise InputError("there is no bound to hold a measurement to: attach with epsilon=")
            self._forwards.refuse_other_processes()
            self._forwards.check_idle()
            while not (record := self.veto.judge_measured(measure())).accepted:
                if not self.veto.below_floors():
                    raise PlacementError(record.reason)
                self._keeper.raise_floors(record)
            return record

    def compile(self) -> None:
        """Compile steps of decoding: where all weights reside one graph of torch.compile, whose
        first step takes a minute or so; where some stream its pieces, with hooks between them. The
        same again is what Inductor's cache saves.

        ``generate`` then has a static cache, unless told otherwise. What isn't a step of one token
        with a static cache runs as before. So do steps that can't be compiled: a warning says why,
        once.
        """
        with self._forwards.lock:
            if self._detached:
                raise PlacementError("nothing can be compiled after detach: attach again")
            self._forwards.check_idle()
            self._forwards.around.compile_decoding()

    @property
    def virtual_seconds(self) -> float:
        """Emulated time charged on the virtual clock since attach or the last reset; 0 where time
        is really spent.
        """
        return self._keeper.memory.charges.virtual_seconds

    def stats(self) -> Stats:
        """Return what happened since attach or the last reset; waits for a GPU."""
        with self._forwards.lock:
            keeper = self._keeper
            keeper.recorder.link_seconds += keeper.memory.transport.take_link_seconds()
            keeper.recorder.link_seconds += keeper.residency.experts.transport.take_link_seconds()
            return keeper.recorder.snapshot(
                mode=self.mode,
                clock=str(self.clock),
                wait_error=keeper.memory.charges.wait_error(),
                bytes_per_tier=keeper.bytes_per_tier(),
                experts=self._forwards.lookahead.stats(),
            )

    def reset_stats(self) -> None:
        """Start all statistics anew."""
        with self._forwards.lock:
            self._keeper.memory.transport.take_link_seconds()
            self._forwards.lookahead.reset_stats()
            self._keeper.recorder.reset()
            self._keeper.memory.charges.reset()

    def detach(self) -> None:
        """Take the hooks off and bring every weight back, bit for bit; a second call does nothing.

        Raises PlacementError if weights could not be brought back (stored bytes were damaged, or
        memory is short): the parameters concerned stay unusable rather than wrong, and detach may
        be called again.
        """
        self._end(self._keeper.residency.close)

    def discard(self) -> None:
        """Take the hooks off and free the weights, which don't come back: for a model that nobody
        uses any more.
        """
        self._end(self._keeper.residency.free)

    def _end(self, let_go: Callable[[], None]) -> None:
        if self._detached:
            return
        with self._forwards.lock:
            self._forwards.refuse_other_processes()
            self._forwards.check_idle()
        self._end_control()
        with self._forwards.lock:
            self._forwards.check_idle()
            self._forwards.remove()
            with plain_tensors():
                let_go()
            self._detached = True

    def _end_control(self) -> None:
        if self._control is not None:
            self._control.stop()
            self._control = None

    def _return_to(self, plan: Plan, payloads: Mapping[str, Payload]) -> None:
        with self._forwards.lock:
            if not self._detached:
                self._forwards.check_idle()
                self._keeper.return_to(plan, payloads)
