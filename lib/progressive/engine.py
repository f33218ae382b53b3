"""Serving many requests from one model, each at the precision of keys and values that it asks for.

    with Engine(model, kv_budget=2**30) as engine:
        engine.submit(GenerationRequest(prompt=ids, max_new_tokens=64), print)

A thread computes step by step. A step is one forward of the model, which is left as it is: the rows
of all requests, packed, through an attention function of ours (``batch.py``). Which requests share
it, and who may climb, the scheduler says (``scheduler.py``), within ``kv_budget`` bytes of fast
memory; what a request does next is its own affair (``active.py``).
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch

from ..errors import InputError, PlacementError
from .active import LONGEST_WINDOW
from .audit_file import AuditFile
from .bounds import RequestError
from .calibrated import AUDITED_SHARE, CalibratedBounds
from .calibration import Calibration
from .generation import Event, Finish, GenerationRequest, Outcome
from .kv.originals import OriginalsFolder
from .ladder import BLOCK_TOKENS, Ladder, make_ladder
from .measuring import OnMeasured, tell_unmeasured
from .runner import STEP_TOKENS, Runner
from .scheduler import Scheduler
from .served import ServedModel
from .waiting import EngineStats, tell

PREFIX_BYTES = 2**30
"""Of disk, for what requests share that begin alike."""
_SOFT_QUANTILE = 0.5
"""Of what climbs will take, kept free: that one waits now and then costs less than requests that
wait for room which nobody uses (docs/progressive.md).
"""
_IDLE_SECONDS = 0.05
"""Until the next look at deadlines, where all that run wait for room."""


class QueueFull(RequestError):
    """So many requests wait already that another is not taken."""


class Engine:
    """Answers requests with a model of transformers, which is its alone until it is closed.

    ``kv_budget``: bytes of fast memory for keys and values, the room for one layer of originals
    included. ``ladder``: or names of tiers. ``folder``: on a disk, where originals go.
    ``context``: tokens of a text at most. ``calibration``: of this model and ladder, for bounds
    with a delta, of which a share is audited; ``audit_file``: where what audits find is kept, else
    it is forgotten with the engine. ``prefix_bytes``: of disk, for originals that later
    requests that begin alike take over; 0: none are kept. ``history``: kind of bound -> how many of
    earlier requests climbed, and how many there were; without it all are taken to climb at first
    but verified ones, for whose climbs nothing is kept free.
    Raises InputError for a model whose attention can't be served by request, and for a budget
    without room beside the slot.
    """

    def __init__(
        self,
        model: Any,
        *,
        kv_budget: int,
        ladder: Ladder | str | None = None,
        folder: Path | None = None,
        context: int | None = None,
        calibration: Calibration | None = None,
        audited_share: float = AUDITED_SHARE,
        audit_file: AuditFile | None = None,
        prefix_bytes: int = PREFIX_BYTES,
        history: Mapping[str, tuple[int, int]] | None = None,
        max_queue: int = 256,
    ) -> None:
        self._served = ServedModel(model, context)
        self.context = self._served.context
        self.shape = self._served.shape
        try:
            if not isinstance(ladder, Ladder):
                made = calibration.ladder if calibration else make_ladder(self.shape)
                ladder = made if ladder is None else made.restrict(ladder)
            if ladder.shape != self.shape:
                raise InputError(
                    f"the ladder is of {ladder.shape}, and the model has {self.shape}: make one, "
                    "or a calibration, of this model"
                )
            if calibration is not None:
                calibration.check_covers(ladder)
            self.ladder = ladder
            self._calibrated = CalibratedBounds(
                calibration, ladder.full, audited_share=audited_share, audit_file=audit_file
            )
            layer_bytes = STEP_TOKENS * self.shape.token_bytes // self.shape.layers
            self.fixed_bytes = fixed_bytes = self._served.slot.num_bytes + layer_bytes
            self._lock = threading.Condition()
            self._runner = Runner(
                self._served,
                self.ladder,
                OriginalsFolder(folder),
                Scheduler(
                    self.ladder,
                    kv_budget,
                    slot_bytes=fixed_bytes,
                    window=LONGEST_WINDOW,
                    growth_tokens=BLOCK_TOKENS,
                    soft_quantile=_SOFT_QUANTILE,
                    history=history,
                ),
                self._lock,
                fixed_bytes=fixed_bytes,
                kv_budget=kv_budget,
                calibrated=self._calibrated,
                prefix_bytes=prefix_bytes,
            )
        except BaseException:
            self._served.close()
            raise
        self._max_queue = max_queue
        self._cancelled: set[int] = set()
        self._stopped: set[int] = set()
        self._closing = False
        self._broken: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def check(self, request: GenerationRequest) -> None:
        """Raise RequestError for a request that can't be answered, whatever else there is."""
        self._served.check(request)
        self._calibrated.check(request)

    def submit(
        self,
        request: GenerationRequest,
        on_event: Callable[[Event], None],
        *,
        tier: int | None = None,
    ) -> int:
        """Take a request, and return its number. ``on_event`` is called from the engine's thread
        with tokens as they are released, then an Outcome or an exception, and is to return at once.

        ``tier``: the one to answer at, come what may; nothing is known of the answer then.

        Raises RequestError as ``check`` does and where it can never fit, QueueFull (its subclass)
        where too many wait.
        """
        self.check(request)
        with self._lock:
            self._check_open()
            if len(self._runner.waiting) >= self._max_queue:
                raise QueueFull(
                    f"{len(self._runner.waiting)} requests wait already: try again later",
                    code="queue_full",
                )
            number = self._runner.enqueue(request=request, on_event=on_event, tier=tier)
            self._lock.notify_all()
        return number

    def measure(
        self, request: GenerationRequest, on_measured: OnMeasured, *, tier: int | None = None
    ) -> None:
        """Answer a request, and measure by how much its tokens' distributions differ from the full
        model's; ``on_measured`` is called with the result. ``tier``: as ``submit`` has it.

        Raises RequestError for a request that can't be answered.
        """
        self.check(request)

        def on_event(event: Event) -> None:
            if isinstance(event, Exception) or (
                isinstance(event, Outcome) and event.finish is Finish.CANCELLED
            ):
                tell_unmeasured(on_measured, event)

        with self._lock:
            self._check_open()
            self._runner.enqueue(
                request=request, on_event=on_event, tier=tier, on_measured=on_measured
            )
            self._lock.notify_all()

    def cancel(self, number: int) -> None:
        """End a request: its memory is free before the next step."""
        with self._lock:
            self._cancelled.add(number)
            self._lock.notify_all()

    def stop(self, number: int) -> None:
        """End a request that has enough: its answer is whole, as at a stop token."""
        with self._lock:
            self._stopped.add(number)
            self._lock.notify_all()

    def resize(self, kv_budget: int) -> None:
        """Change the budget. A smaller one is kept when this returns: verified requests step down,
        then the youngest give back all, wait, and are computed anew; answers stay as they were.

        Raises InputError, and nothing has changed, for a budget that a request which is here could
        never fit into.
        """
        with self._lock:
            self._check_open()
            scheduler, stats = self._runner.scheduler, self._runner.stats
            scheduler.resize(kv_budget)
            stats.kv_budget = kv_budget
            self._lock.notify_all()
            self._lock.wait_for(
                lambda: (
                    not self.is_alive
                    # Of what is promised, and of what a step before has come to.
                    or max(scheduler.bytes_held() + self.fixed_bytes, stats.kv_bytes) <= kv_budget
                )
            )

    @property
    def is_alive(self) -> bool:
        """Whether it takes requests: it hasn't been closed, and no bug has ended it."""
        return not self._closing and self._broken is None

    def stats(self) -> EngineStats:
        """Return a copy of what was counted so far."""
        runner = self._runner
        audits = self._calibrated.counts()
        with self._lock:
            return replace(
                runner.stats,
                **audits,
                waiting=len(runner.waiting),
                running=len(runner.active),
                tiers=dict(runner.stats.tiers),
            )

    def drain(self, timeout: float) -> bool:
        """Wait until nothing is left to do; False if something is after so many seconds."""
        with self._lock:
            return self._lock.wait_for(lambda: not self._has_work, timeout)

    def close(self) -> None:
        """End all requests, and give the model back as it was."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            self._lock.notify_all()
        self._thread.join()
        self._runner.prefixes.close()
        self._served.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _has_work(self) -> bool:
        return bool(self._runner.waiting or self._runner.active)

    def _check_open(self) -> None:
        if self._closing or self._broken is not None:
            raise RequestError("the engine is closed, or has stopped", code="closed")

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._go_on():
                    pass
        except BaseException as error:  # a bug: nobody is to wait for ever
            failure = PlacementError(f"the engine has stopped: {error!r}")
            runner = self._runner
            with self._lock:
                self._broken = error
                callbacks = [each.on_event for each in runner.waiting.values()]
                callbacks += [each.on_event for each in runner.active.values()]
                runner.waiting.clear()
                runner.active.clear()
                self._lock.notify_all()
            for on_event in callbacks:
                tell(on_event, failure)
            raise

    def _go_on(self) -> bool:
        """Make a step; False once it is closed."""
        runner = self._runner
        with self._lock:
            self._lock.wait_for(
                lambda: self._closing or self._cancelled or self._stopped or self._has_work
            )
            closing = self._closing
            if closing:
                self._cancelled.update(runner.waiting, runner.active)
            cancelled, self._cancelled = self._cancelled, set()
            stopped, self._stopped = self._stopped, set()
        runner.drop(cancelled, stopped - cancelled)
        if not closing and not runner.go_on():
            with self._lock:
                self._lock.wait(_IDLE_SECONDS)
        return not closing or self._has_work
