"""The hooks that run a model under a plan, and take themselves off again without a trace.

Every group's module gets a forward pre-hook that acquires the group and a post-hook that releases
it, also when the forward raises. What "acquire" does is the residency's business; what a forward
means to the plan is the runtime's.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from types import FrameType
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ...errors import PlacementError
from ...policy.plan import Step
from ..residency.casting import UnkeptCopies, autocast_dtype
from ..residency.held import HeldGroup
from ..residency.residency import Residency
from ..residency.stand_ins import NO_GRADIENTS, requires_grad
from ..telemetry import Recorder
from .fast_path import EncoderPaths
from .group_hook import GroupHook
from .guards import Guards
from .managed import attached
from .progress import PassBar
from .tracing import refuse_tracing


class Supervisor(Protocol):
    """Who decides whether a forward may begin, and what follows from its end."""

    def begin_forward(self) -> int:
        """Let a forward begin, or raise; returns the bytes that it will stream."""

    def end_forward(self, error: BaseException | None) -> None:
        """Hear of a forward's end, and of the error that ended it."""


class Forwards:
    """The hooks on a model, and the forward that it is in. One thread at a time may be in one."""

    def __init__(
        self,
        model: nn.Module,
        residency: Residency,
        recorder: Recorder,
        schedule: Sequence[Step],
        *,
        supervisor: Supervisor,
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
        self._held: list[tuple[GroupHook, list[HeldGroup], UnkeptCopies | None]] = []
        self._unkept: UnkeptCopies | None = None
        self._implicit: nn.Module | None = None
        """The submodule whose call by itself is the present forward."""
        self._process = os.getpid()
        self._thread: threading.Thread | None = None
        self._callers_error: BaseException | None = None
        """What the caller was handling when the present forward began: a retry in its except."""
        self._bar = PassBar()
        self._handles: list[RemovableHandle] = []
        self._encoders = EncoderPaths(trains=residency.trains)
        self._memory = residency.memory
        self._install()

    def remove(self) -> None:
        """Take all hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._encoders.remove()
        for module in self._model.modules():
            attached.discard(module)
        self._guards.remove()
        self._bar.close()

    def note_use(self, group: str) -> None:
        """Trace a use of weights outside the modules that own them."""
        users = (hook for hook, _, _ in self._held if not hook.lookup)
        if not any(group == own.name for hook in users for own in hook.groups):
            self.trace.append(Step(group))

    @property
    def running(self) -> list[str]:
        """The groups of the modules that are running."""
        return [group.name for hook, _, _ in self._held for group in hook.groups]

    @property
    def expected(self) -> tuple[Step, ...]:
        """The uses of the present forward so far, and those of groups that it hasn't used yet."""
        named = {step.block for step in self.trace}
        return (*self.trace, *(step for step in self.schedule if step.block not in named))

    def _install(self) -> None:
        users: dict[str, list[HeldGroup]] = {}
        for group in self._residency.groups.values():
            for module_name in group.payload.group.modules:
                users.setdefault(module_name, []).append(group)
        for module_name, groups in users.items():
            module, hook = self._model.get_submodule(module_name), GroupHook(self, groups)
            if isinstance(module, nn.TransformerEncoderLayer):
                self._encoders.add_layer(module, partial(hook.hold, module))
            else:
                hook.install(module, self._handles)
        self._encoders.add_others(self._model)
        for name in _containers(users):
            self._install_entry(self._model.get_submodule(name))
        if not isinstance(self._model, nn.TransformerEncoderLayer):  # it is a part by itself
            # Last and in front: it sees each forward begin before any group is acquired.
            begin = self._model.register_forward_pre_hook(
                self._begin_forward, prepend=True, with_kwargs=True
            )
            end = self._model.register_forward_hook(self._end_forward, always_call=True)
            self._handles += [begin, end]
        for module in self._model.modules():
            attached.add(module)
        self._guards = Guards(self._model, self._save_state)

    def _install_entry(self, module: nn.Module) -> None:
        """Let a part of the model be called by itself: a base model, an encoder, a layer."""

        def begin(module: nn.Module, args: Any) -> None:
            refuse_tracing()
            with self.lock:
                self._refuse_other_threads()
                if self._thread is not threading.current_thread() or self._was_interrupted(module):
                    self._begin(implicit=module)

        def end(module: nn.Module, args: Any, output: Any) -> None:
            with self.lock:
                if self._thread is threading.current_thread() and self._implicit is module:
                    self._end()

        self._handles += [
            module.register_forward_pre_hook(begin, prepend=True),
            module.register_forward_hook(end, always_call=True),
        ]

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

    def _begin_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        refuse_tracing()
        if torch.is_grad_enabled() and requires_grad((args, kwargs)):
            raise PlacementError(f"inputs require gradients, {NO_GRADIENTS}")
        with self.lock:
            self._begin(implicit=None)

    def _begin(self, *, implicit: nn.Module | None) -> None:
        """Start a forward of the model, or of a submodule that was called by itself."""
        self.refuse_other_processes()
        self._refuse_other_threads()
        # KeyboardInterrupt skips post-hooks: give back what an interrupted forward held.
        self._end_leftovers()
        streamed = self._supervisor.begin_forward()
        self._thread = threading.current_thread()
        self._callers_error = sys.exc_info()[1]
        self._implicit = implicit
        self.trace = []
        self._residency.begin_forward()
        self._recorder.forwards += 1
        self._bar.begin(streamed)
        if autocast_dtype(self._memory.device) is not None:
            self._unkept = UnkeptCopies().__enter__()

    def _end_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        with self.lock:
            if self._thread is threading.current_thread() and self._implicit is None:
                self._end()

    def _end(self) -> None:
        if self._unkept is not None:
            self._unkept.__exit__()
        self._end_leftovers()
        self._thread = None
        # An always-called hook isn't told of the error; without one it sees the caller's.
        error = sys.exc_info()[1]
        if error is self._callers_error:
            error = None
        self._callers_error = None
        if error is None:
            self.schedule = self._expected_schedule()
            self._memory.prefetcher.end_forward()
        self._supervisor.end_forward(error)

    def _expected_schedule(self) -> tuple[Step, ...]:
        """Expect what this forward used; the forward of a part says nothing of the other blocks."""
        if self._implicit is None:
            return tuple(self.trace) or self.schedule
        return self.expected

    def acquire(self, hook: GroupHook, module: nn.Module) -> None:
        """Bring the weights of a module that begins into fast memory."""
        refuse_tracing()
        with self.lock:
            self._refuse_other_threads()
            if self._thread is not threading.current_thread() or self._was_interrupted(module):
                self._begin(implicit=module)
            held: list[HeldGroup] = []
            self._held.append((hook, held, self._enter_casting(hook)))
            for group in hook.groups:
                block, *others = [block.name for block in group.payload.group.blocks]
                lookup = hook.lookup and group.name in self._looked_up
                self.trace.append(Step(group.name, lookup=lookup))
                self._recorder.begin_transfer(block)
                before, moved_bytes = self._memory.charges.virtual_seconds, 0
                try:
                    moved_bytes = group.acquire()
                    held.append(group)
                finally:
                    charged = self._memory.charges.virtual_seconds - before
                    self._recorder.end_transfer(block, moved_bytes, charged)
                    if group not in held:
                        self._recorder.end_compute()
                for other in others:
                    self._recorder.count_call(other)
                self._bar.update(moved_bytes)

    def _enter_casting(self, hook: GroupHook) -> UnkeptCopies | None:
        """Keep autocast, where it is on, from keeping copies; those of this module are booked."""
        dtype = autocast_dtype(self._memory.device)
        if dtype is None:
            return None
        self.casts.add(dtype)
        copied = sum(group.copy_bytes(dtype) for group in hook.groups)
        self._recorder.book_moment(copied)
        return UnkeptCopies(copied).__enter__()

    def _was_interrupted(self, module: nn.Module) -> bool:
        """Say whether the call of a submodule that is taken for the present forward has ended: its
        post-hook doesn't run after a KeyboardInterrupt. The present call is ``module``'s.
        """
        if self._implicit is None:
            return False
        return _num_running(self._implicit) <= (self._implicit is module)

    def release(self, hook: GroupHook, module: nn.Module) -> None:
        """End the use of a module's weights, also where acquiring them failed."""
        with self.lock:
            mine = self._thread is threading.current_thread()
            if not (mine and self._held and self._held[-1][0] is hook):
                return  # a refused call has acquired nothing
            _, held, unkept = self._held.pop()
            if unkept is not None:
                unkept.__exit__()
                self._memory.give_back_copies(unkept.num_bytes)
            for group in reversed(held):
                self._recorder.end_compute()
                group.release()
            if not self._held and self._implicit is module:
                self._end()

    def _refuse_other_threads(self) -> None:
        other = self._thread
        if other not in (None, threading.current_thread()) and other.is_alive():
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
        """Refuse to move weights from under a forward, raising PlacementError; an interrupted one
        doesn't count.
        """
        self._refuse_other_threads()
        root = self._model if self._implicit is None else self._implicit
        if self._thread is threading.current_thread() and _num_running(root):
            raise PlacementError("weights can't be moved during a forward: wait for its end")
        self._end_leftovers()
        self._thread = None

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


def _containers(users: Collection[str]) -> list[str]:
    """Name the modules, but for the model itself, that have users of weights inside them."""
    names: dict[str, None] = {}
    for user in users:
        parts = user.split(".")
        names |= dict.fromkeys(".".join(parts[:end]) for end in range(1, len(parts)))
    return [name for name in names if name not in users]


def _num_running(module: nn.Module) -> int:
    """Count the calls of a module that this thread is in."""
    count, frame = 0, cast(FrameType | None, sys._getframe(1))
    while frame is not None:
        code = frame.f_code
        count += (
            code.co_name == "_call_impl"
            and code.co_filename == nn.modules.module.__file__
            and frame.f_locals.get("self") is module
        )
        frame = frame.f_back
    return count
