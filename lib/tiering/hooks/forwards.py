"""The calls of a model's modules under a plan, surrounded without a trace after ``remove``.

Around every module whose weights move a context acquires its groups and releases them again; what
resides in fast memory runs as it is. The model, and each part of it that may be called by itself,
begins and ends the forward.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from ...errors import PlacementError
from ...policy.plan import Step, replace_uses
from ..residency.casting import UnkeptCopies, autocast_dtype
from ..residency.held import HeldGroup
from ..residency.residency import Residency
from ..telemetry import Recorder
from .experts import serve_experts
from .group_hook import GroupHook
from .progress import PassBar, count_passes
from .requests import Requests
from .surroundings import Surroundings


class Supervisor(Protocol):
    """Who decides whether a forward may begin, and what follows from its end."""

    def begin_forward(self) -> int:
        """Let a forward begin, or raise; returns the bytes that it will stream."""

    def end_forward(self, error: BaseException | None) -> None:
        """Hear of a forward's end, and of the error that ended it."""

    def leave_room_for_copies(self, dtype: torch.dtype) -> None:
        """Have room for the copies that autocast makes from here on, or raise."""


class Forwards:
    """The calls of a model, and the forward that it is in. One thread at a time may be in one."""

    def __init__(
        self,
        model: nn.Module,
        residency: Residency,
        recorder: Recorder,
        schedule: Sequence[Step],
        *,
        supervisor: Supervisor,
        look_ahead: bool = True,
    ) -> None:
        self.schedule = tuple(schedule)
        """The uses that the next forward is expected to make."""
        self.trace: list[Step] = []
        """The uses of the present one."""
        self.lock = threading.RLock()
        self._model = model
        self._residency = residency
        self._recorder = recorder
        self._looked_up = {step.block for step in schedule if step.lookup}
        self._supervisor = supervisor
        self.casts: set[torch.dtype] = set()
        """What autocast has computed in so far."""
        self._held: list[_Use] = []
        """The modules that are running, the innermost last."""
        self._unkept: UnkeptCopies | None = None
        self._call: object | None = None
        """The call with which the present forward began."""
        self._part: nn.Module | None = None
        """The submodule whose call by itself is the present forward; None: the model's."""
        self._process = os.getpid()
        self._thread: threading.Thread | None = None
        self._bar = PassBar()
        self._memory = residency.memory
        self._hooks_changed = False
        """They are others than when the present forward began."""
        self._has_traced_all = False
        """A forward has shown the uses of all blocks, and whether the model enters autocast."""
        self._watches = False
        """The next forward is to show them."""
        self.lookahead = serve_experts(model, residency, look_ahead=look_ahead)
        self.around = Surroundings(
            self, model, residency, save_state=self._save_state, generation=self._generation
        )
        self.requests = Requests(self, residency)
        """What other threads want done while the model runs."""
        self.follow_plan()

    def remove(self) -> None:
        """Let the model run as before."""
        self.around.remove()
        self.lookahead.remove()
        self._bar.close()

    def follow_plan(self) -> None:
        """Surround the calls of the modules whose weights move now, and no others.

        In emulation all, since what resides may be charged for as well. Where fast memory is
        limited all until a forward has shown what is used, and all once autocast makes copies:
        those of a module are dropped at its end.
        """
        residency = self._residency
        self._watches = self._memory.is_limited and not self._has_traced_all
        copies = self._memory.is_limited and bool(self.casts)
        every = residency.emulated or self._watches or copies
        watched = residency.groups.values() if every else residency.moving
        hooked = [group.name for group in watched if group.is_hooked]
        self._hooks_changed |= self.around.follow(hooked)
        self.lookahead.follow()

    def stop_everywhere(self) -> None:
        """Surround the calls of all modules, so that the present forward comes by soon."""
        self._hooks_changed |= self.around.hook_all()

    @property
    def is_running(self) -> bool:
        """A forward runs, in whichever thread."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def is_mine(self) -> bool:
        """A forward runs in this thread."""
        return self._thread is threading.current_thread()

    def note_use(self, group: str) -> None:
        """Trace a use of weights outside the modules that own them."""
        users = (use.hook for use in self._held if not use.hook.lookup)
        if not any(group == own.name for hook in users for own in hook.groups):
            self.trace.append(Step(group))

    @property
    def running(self) -> list[str]:
        """The groups of the modules that are running."""
        return [group.name for use in self._held for group in use.hook.groups]

    @property
    def expected(self) -> tuple[Step, ...]:
        """The uses of the present forward so far, and those of groups that it hasn't used yet."""
        left = self.around.traced - {step.block for step in self.trace}
        expected = (step for step in self.schedule if step.block in left)
        return self._in_order([*self.trace, *expected])

    def _in_order(self, uses: Sequence[Step]) -> tuple[Step, ...]:
        """Return uses that were traced, and between them those that are expected of the others."""
        traced = self.around.traced | {step.block for step in uses}
        return replace_uses(self.schedule, uses, traced)

    def enter(self, call: object, part: nn.Module | None) -> None:
        """Begin a forward of the model (None), or of a part where none runs: it ends with the
        call.
        """
        with self.lock:
            self._refuse_other_threads()
            if part is None or not self.is_mine:
                self._begin(call, part)

    def leave(self, call: object, failure: BaseException | None) -> None:
        """End the forward that began with a call."""
        with self.lock:
            if self._call is call:
                try:
                    self._end(failure)
                finally:
                    self._thread = self._call = None

    def _generation(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> contextlib.AbstractContextManager[None]:
        num_passes = count_passes(self._model, args, kwargs)
        return self._bar.generation(num_passes, streams_text=kwargs.get("streamer") is not None)

    def _save_state(
        self,
        module: nn.Module,
        save: Callable[..., None],
        destination: dict[str, Any],
        prefix: str,
        keep_vars: bool,
    ) -> None:
        """Write a module's part of a state_dict: weights that are away into host memory."""
        lossy = self._residency.lossy_parameters()
        if any(id(parameter) in lossy for parameter in module._parameters.values()):
            raise PlacementError(
                "weights are held compressed, and a state_dict would have them for good: detach "
                "first"
            )
        with self.lock, self._memory.copies_on_host():
            save(destination, prefix, keep_vars)

    def _begin(self, call: object, part: nn.Module | None) -> None:
        self.refuse_other_processes()
        self._end_leftovers()
        self.requests.serve()
        self.trace = []
        streamed = self._supervisor.begin_forward()
        if (dtype := autocast_dtype(self._memory.device)) is not None:
            self._note_cast(dtype)
        self._hooks_changed = False
        self._call, self._part = call, part
        self._thread = threading.current_thread()
        self._residency.begin_forward()
        self._recorder.forwards += 1
        self._bar.begin(streamed)
        if autocast_dtype(self._memory.device) is not None:
            self._unkept = UnkeptCopies().__enter__()

    def _end(self, failure: BaseException | None) -> None:
        self._thread = self._call = None
        if self._unkept is not None:
            self._unkept.__exit__()
        self._end_leftovers()
        if failure is None:
            self.schedule = self._expected_schedule()
            if self._watches and self._part is None and not self._hooks_changed:
                self._has_traced_all = True
                self.follow_plan()
            self._memory.prefetcher.end_forward()
        elif isinstance(failure, Exception):  # of which reads ahead may have the cause in common
            self._memory.prefetcher.forget_failed()
        self._supervisor.end_forward(failure)

    def _expected_schedule(self) -> tuple[Step, ...]:
        """Expect what this forward used; that of a part says nothing of the other blocks, nor does
        one in the midst of which hooks were made of their uses before.
        """
        if not self.trace:
            return self.schedule
        if self._part is None and not self._hooks_changed:
            return self._in_order(self.trace)
        return self.expected

    def acquire(self, call: object, hook: GroupHook) -> None:
        """Bring the weights of a module that begins into fast memory."""
        with self.lock:
            self.requests.serve()
            use = _Use(call, hook)
            self._held.append(use)
            use.unkept = self._enter_casting(hook)
            for group in hook.groups:
                block, *others = [block.name for block in group.payload.group.blocks]
                lookup = hook.lookup and group.name in self._looked_up
                if not group.is_routed:
                    self.trace.append(Step(group.name, lookup=lookup))
                self._recorder.begin_transfer(block)
                before, moved_bytes = self._memory.charges.virtual_seconds, 0
                try:
                    moved_bytes = group.acquire()
                    use.acquired.append(group)
                finally:
                    charged = self._memory.charges.virtual_seconds - before
                    self._recorder.end_transfer(block, moved_bytes, charged)
                    if group not in use.acquired:
                        self._recorder.end_compute()
                for other in others:
                    self._recorder.count_call(other)
                self._bar.update(moved_bytes)

    def _note_cast(self, dtype: torch.dtype) -> None:
        """Have room for the copies of weights in a dtype, and hooks that drop them."""
        if dtype not in self.casts:
            self.casts.add(dtype)
            self._supervisor.leave_room_for_copies(dtype)
            self.follow_plan()

    def _enter_casting(self, hook: GroupHook) -> UnkeptCopies | None:
        """Keep autocast, where it is on, from keeping copies; those of this module are booked."""
        dtype = autocast_dtype(self._memory.device)
        if dtype is None:
            return None
        self._note_cast(dtype)
        copied = sum(group.copy_bytes(dtype) for group in hook.groups)
        self._recorder.book_moment(copied)
        return UnkeptCopies(copied).__enter__()

    def release(self, call: object) -> None:
        """End the use of a module's weights, if its call has begun one."""
        with self.lock:
            if not (self._held and self._held[-1].call is call):
                return
            use = self._held.pop()
            if use.unkept is not None:
                use.unkept.__exit__()
                self._memory.give_back_copies(use.unkept.num_bytes)
            for group in reversed(use.acquired):
                self._recorder.end_compute()
                group.release()

    def _refuse_other_threads(self) -> None:
        if self.is_running and not self.is_mine:
            raise PlacementError("another thread runs the model: one forward at a time")

    def refuse_other_processes(self) -> None:
        """Raise PlacementError in a child that was forked after attach."""
        if os.getpid() != self._process:
            raise PlacementError(
                "the process was forked after attach, and reader threads don't survive a fork: "
                "load and attach in the child process"
            )

    def _end_leftovers(self) -> None:
        self._held.clear()
        self._unkept = None  # an autocast context that was interrupted has restored its setting
        self._recorder.leave_all()
        self._residency.end_holds()
        self._bar.end()

    def check_idle(self) -> None:
        """Refuse to move weights from under a forward, raising PlacementError."""
        self._refuse_other_threads()
        if self.is_mine:
            raise PlacementError("weights can't be moved during a forward: wait for its end")
        self._end_leftovers()

    @contextlib.contextmanager
    def moving(self, group: str) -> Iterator[Callable[[int], None]]:
        """Book a transfer that no module hook asked for."""
        block = self._residency.groups[group].payload.group.blocks[0].name
        moved: list[int] = []
        with self.alone():
            before = self._memory.charges.virtual_seconds
            self._recorder.begin_transfer(block, counts=False)
            try:
                yield moved.append
            finally:
                charged = self._memory.charges.virtual_seconds - before
                self._recorder.end_transfer(block, sum(moved), charged)
                self._recorder.end_compute()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other threads from the slots, and a forked child from waiting for its parent's."""
        with self.lock:
            self.refuse_other_processes()
            self._refuse_other_threads()
            yield


@dataclass(slots=True, eq=False)
class _Use:
    """A module that runs."""

    call: object
    hook: GroupHook
    acquired: list[HeldGroup] = field(default_factory=list)
    unkept: UnkeptCopies | None = None
