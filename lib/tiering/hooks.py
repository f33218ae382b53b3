"""The hooks that run a model under a plan, and take themselves off again without a trace.

Every group's module gets a forward pre-hook that acquires the group and a post-hook that releases
it, also when the forward raises. What "acquire" does is the residency's business.
"""

import contextlib
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import FrameType, MappingProxyType, TracebackType
from typing import Any, Self, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..blocks import Block
from ..errors import InputError, PlacementError
from ..hints import Tier
from ..policy.audit import Audit, Record
from ..policy.plan import Plan, Step
from ..policy.veto import Measure, Veto
from ..units import format_bytes
from .emulation import EmulatedLink
from .offloaded import NO_GRADIENTS, requires_grad
from .payload import Group
from .progress import PassBar
from .residency import Residency
from .specs import Clock, EmulationSpec
from .telemetry import BlockStats, Recorder, Stats

_attached: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
"""Modules of models that a runtime holds; weak, so that a forgotten model is freed."""
_STEP_DOWN = 0.85
"""What is left of the fast memory in use when an out-of-memory makes the runtime take less."""


class Runtime:
    """A model under a plan; a context manager that detaches. Runs one forward at a time."""

    def __init__(
        self,
        model: nn.Module,
        blocks: tuple[Block, ...],
        residency: Residency,
        plan: Plan,
        make_plan: Callable[[Mapping[str, str | int | None], Sequence[Step]], Plan],
        veto: Veto,
        *,
        emulated: EmulatedLink | None,
        device: torch.device,
        schedule: Sequence[Step],
        labels: Mapping[str, Tier],
    ) -> None:
        self.mode = "real" if emulated is None else "emulated"
        self._emulated = emulated
        self.plan = plan
        """Where each group of blocks is, and what that was predicted to cost."""
        self.veto = veto
        """Judges every plan before anything moves; knows floors, bounds and what is held."""
        self._model = model
        self._blocks = {block.name: block for block in blocks}
        self._residency = residency
        self._make_plan = make_plan
        self._labels = labels
        self._lock = threading.RLock()
        self._held: list[tuple[_GroupHook, list[str]]] = []
        self._implicit: nn.Module | None = None
        """The submodule whose call by itself is the present forward."""
        self._process = os.getpid()
        self._broken: str | None = None
        """Why nothing can run: moving weights has failed half-way."""
        self._bar = PassBar()
        self._handles: list[RemovableHandle] = []
        self._thread: threading.Thread | None = None
        self._detached = False
        self._schedule = tuple(schedule)
        self._looked_up = {step.block for step in schedule if step.lookup}
        self._trace: list[Step] = []
        self._final_plan: Plan | None = None
        """A plan that could not be made to hold what its forwards use."""
        self._unplanned = False
        """The present forward used weights whole of which the plan foresaw lookups only."""
        self._recorder = Recorder(
            device=device,
            blocks={
                block.name: BlockStats(
                    tier=str(self._tier_of(group, block)), num_bytes=block.num_bytes
                )
                for group in residency.groups
                for block in group.blocks
            },
            resident_bytes=residency.resident_bytes(),
        )
        self._recorder.reset()
        residency.access.on_extra = self._recorder.change_resident
        residency.access.on_move = self._moving
        residency.access.on_use = self._note_use
        self._install()
        for module in model.modules():
            _attached.add(module)
            # to(), half(), cuda(): Module._apply would convert the resident half of the model and
            # then fail.
            module.__dict__["_apply"] = _refuse_apply
            # Half of the weights would be loaded, and the rest refuse.
            module.__dict__["_load_from_state_dict"] = _refuse_apply

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

    @property
    def budget(self) -> dict[str, int | None]:
        """The bytes that each tier may hold (None: no limit); empty where the hints alone decided.

        Setting it plans anew and moves what must move, between forwards, without reloading the
        model. Raises InputError for a budget that is too small (nothing has moved then), and
        PlacementError during a forward.
        """
        return {str(tier): size for tier, size in self.plan.budget.items()}

    @budget.setter
    def budget(self, budget: Mapping[str, str | int | None]) -> None:
        with self._lock:
            if self._detached:
                raise PlacementError("the budget can't be changed after detach: attach again")
            self._refuse_other_processes()
            self._check_idle()
            self._carry_out(self._make_plan(budget, self._schedule))

    @contextlib.contextmanager
    def limited(self, budget: Mapping[str, str | int | None]) -> Iterator[Self]:
        """Run under another budget for a while; the plan before comes back."""
        before, labels = self.plan, self._labels
        self.budget = dict(budget)
        try:
            yield self
        finally:
            with self._lock:
                if not self._detached:
                    self._check_idle()
                    self._carry_out(before, labels)

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
        with self._lock:
            if self._emulated is None:
                raise InputError("real mode emulates no machine: attach with mode='emulated'")
            if spec.clock is not self.clock:
                raise InputError(
                    f"the clock is {self.clock} since attach and can't become {spec.clock}: attach "
                    "again"
                )
            self._check_idle()
            before, self._emulated.spec = self._emulated.spec, spec
            try:
                self._emulated.check(self.plan)
            except InputError:
                self._emulated.spec = before
                raise

    @property
    def audit(self) -> Audit:
        """What was asked of the veto, and what it answered."""
        return self.veto.audit

    def check_quality(self, measure: Measure) -> Record:
        """Measure the KL of the model as it runs, and raise floors where it is above epsilon.

        ``measure`` runs forwards on held-out text. Where a block is below its floor then, the model
        refuses to go on: detach, and attach with hints that have the floors
        (``lib.precision.floors.raise_floors(hints, runtime.veto.ledger.floors)``). Raises
        PlacementError where all weights are lossless already and the KL is above epsilon all the
        same: it is of another model then, or another text encoding.
        """
        with self._lock:
            if self._detached:
                raise PlacementError("quality can't be measured after detach: attach again")
            record = self.veto.judge_measured(measure())
            if low := self.veto.check_held():
                self._broken = (
                    f"{record.reason}; detach, and attach again with floors raised (such as block "
                    f"{low[0]!r} to {self.veto.ledger.floors[low[0]]})"
                )
            elif not record.accepted:
                raise PlacementError(record.reason)
            return record

    @property
    def virtual_seconds(self) -> float:
        """Emulated time charged on the virtual clock since attach or the last reset; 0 where time
        is really spent.
        """
        return self._residency.virtual_seconds

    def stats(self) -> Stats:
        """Return what happened since attach or the last reset; waits for a GPU."""
        with self._lock:
            return self._recorder.snapshot(
                mode=self.mode,
                clock=str(self.clock),
                wait_error=self._residency.wait_error(),
                bytes_per_tier=self._bytes_per_tier(),
            )

    def reset_stats(self) -> None:
        """Start all statistics anew."""
        with self._lock:
            self._recorder.reset()
            self._residency.reset()

    def detach(self) -> None:
        """Take the hooks off and bring every weight back, bit for bit; a second call does nothing.

        Raises PlacementError if weights could not be brought back (stored bytes were damaged, or
        memory is short): the parameters concerned stay unusable rather than wrong, and detach may
        be called again.
        """
        if self._detached:
            return
        with self._lock:
            self._refuse_other_processes()
            self._check_idle()
            for handle in self._handles:
                handle.remove()
            self._handles.clear()
            for module in self._model.modules():
                _attached.discard(module)
                module.__dict__.pop("_apply", None)
                module.__dict__.pop("_load_from_state_dict", None)
            with torch.inference_mode(mode=False), torch.no_grad():
                self._residency.close()
            self._bar.close()
            self._detached = True

    def _install(self) -> None:
        users: dict[str, list[Group]] = {}
        for group in self._residency.groups:
            for module_name in group.modules:
                users.setdefault(module_name, []).append(group)
        for module_name, groups in users.items():
            _GroupHook(self, groups).install(self._model.get_submodule(module_name), self._handles)
        for name in _containers(users):
            self._install_entry(self._model.get_submodule(name))
        lossy = self._residency.lossy_parameters()
        for module in self._model.modules():
            if any(id(parameter) in lossy for parameter in module._parameters.values()):
                self._handles.append(module.register_state_dict_pre_hook(_refuse_state_dict))  # type: ignore[no-untyped-call]
        # Last and in front: it sees each forward begin before any group is acquired.
        begin = self._model.register_forward_pre_hook(
            self._begin_forward, prepend=True, with_kwargs=True
        )
        end = self._model.register_forward_hook(self._end_forward, always_call=True)
        self._handles += [begin, end]

    def _install_entry(self, module: nn.Module) -> None:
        """Let a part of the model be called by itself: a base model, an encoder, a layer."""

        def begin(module: nn.Module, args: Any) -> None:
            with self._lock:
                self._refuse_other_threads()
                if self._thread is not threading.current_thread() or self._was_interrupted(module):
                    self._begin(implicit=module)

        def end(module: nn.Module, args: Any, output: Any) -> None:
            with self._lock:
                if self._thread is threading.current_thread() and self._implicit is module:
                    self._end()

        self._handles += [
            module.register_forward_pre_hook(begin, prepend=True),
            module.register_forward_hook(end, always_call=True),
        ]

    def _begin_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            _refuse_compile()
        if torch.is_grad_enabled() and requires_grad((args, kwargs)):
            raise PlacementError(f"inputs require gradients, {NO_GRADIENTS}")
        with self._lock:
            self._begin(implicit=None)

    def _begin(self, *, implicit: nn.Module | None) -> None:
        """Start a forward of the model, or of a submodule that was called by itself."""
        if self._broken is not None:
            raise PlacementError(self._broken)
        self._refuse_other_processes()
        self._refuse_other_threads()
        # KeyboardInterrupt skips post-hooks: give back what an interrupted forward held.
        self._end_leftovers()
        self._thread = threading.current_thread()
        self._implicit = implicit
        self._trace, self._unplanned = [], False
        self._residency.begin_forward()
        self._recorder.forwards += 1
        streamed = sum(sum(p.unit_bytes) for p in self.plan.placements.values())
        self._bar.begin(streamed)

    def _end_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        with self._lock:
            if self._thread is threading.current_thread() and self._implicit is None:
                self._end()

    def _end(self) -> None:
        self._end_leftovers()
        self._thread = None
        error = sys.exc_info()[1]
        if error is None:
            self._schedule = self._expected_schedule()
            self._residency.end_forward()
            if self._unplanned and self.plan.budget and self.plan is not self._final_plan:
                self._plan_again()
        elif _is_out_of_memory(error):
            self._step_down(error)

    def _expected_schedule(self) -> tuple[Step, ...]:
        """Expect what this forward used; the forward of a part says nothing of the other blocks."""
        if self._implicit is None:
            return tuple(self._trace) or self._schedule
        named = {step.block for step in self._trace}
        return (*self._trace, *(step for step in self._schedule if step.block not in named))

    def _acquire(self, hook: "_GroupHook", module: nn.Module) -> None:
        if torch.compiler.is_compiling():
            _refuse_compile()
        with self._lock:
            self._refuse_other_threads()
            if self._thread is not threading.current_thread() or self._was_interrupted(module):
                self._begin(implicit=module)
            held: list[str] = []
            self._held.append((hook, held))
            for group in hook.groups:
                block = group.blocks[0].name
                lookup = hook.lookup and group.name in self._looked_up
                self._trace.append(Step(group.name, lookup=lookup))
                self._recorder.begin_transfer(block)
                before, moved_bytes = self._residency.virtual_seconds, 0
                try:
                    moved_bytes = self._residency.acquire(group.name)
                    held.append(group.name)
                finally:
                    charged = self._residency.virtual_seconds - before
                    self._recorder.end_transfer(block, moved_bytes, charged)
                    if group.name not in held:
                        self._recorder.end_compute()
                for other in group.blocks[1:]:
                    self._recorder.count_call(other.name)
                self._bar.update(moved_bytes)

    def _wants_gradients(self, hook: "_GroupHook") -> bool:
        return any(self._residency.requires_grad(group.name) for group in hook.groups)

    def _was_interrupted(self, module: nn.Module) -> bool:
        """Say whether the call of a submodule that is taken for the present forward has ended: its
        post-hook doesn't run after a KeyboardInterrupt. The present call is ``module``'s.
        """
        if self._implicit is None:
            return False
        return _num_running(self._implicit) <= (self._implicit is module)

    def _release(self, hook: "_GroupHook", module: nn.Module) -> None:
        with self._lock:
            mine = self._thread is threading.current_thread()
            if not (mine and self._held and self._held[-1][0] is hook):
                return  # a refused call has acquired nothing
            for group in reversed(self._held.pop()[1]):
                self._recorder.end_compute()
                self._residency.release(group)
            if not self._held and self._implicit is module:
                self._end()

    def _refuse_other_threads(self) -> None:
        other = self._thread
        if other not in (None, threading.current_thread()) and other.is_alive():
            raise PlacementError("another thread runs the model: one forward at a time")

    def _refuse_other_processes(self) -> None:
        if os.getpid() != self._process:
            raise PlacementError(
                "the process was forked after attach, and reader threads don't survive a fork: "
                "load and attach in the child process"
            )

    def _end_leftovers(self) -> None:
        self._held.clear()
        self._recorder.leave_all()
        self._residency.end_holds()
        self._bar.end()

    def _check_idle(self) -> None:
        """Refuse to move weights from under a forward; an interrupted one doesn't count."""
        self._refuse_other_threads()
        root = self._model if self._implicit is None else self._implicit
        if self._thread is threading.current_thread() and _num_running(root):
            raise PlacementError("weights can't be moved during a forward: wait for its end")
        self._end_leftovers()
        self._thread = None

    @contextlib.contextmanager
    def _moving(self, group: str) -> Iterator[Callable[[int], None]]:
        """Book a transfer that no module hook asked for."""
        block = self._residency.first_block(group)
        moved: list[int] = []
        with self._alone():
            before = self._residency.virtual_seconds
            self._recorder.begin_transfer(block, counts=False)
            try:
                yield moved.append
            finally:
                charged = self._residency.virtual_seconds - before
                self._recorder.end_transfer(block, sum(moved), charged)
                self._recorder.end_compute()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other threads from the slots, and a forked child from waiting for its parent's."""
        with self._lock:
            self._refuse_other_processes()
            self._refuse_other_threads()
            yield

    def _carry_out(self, plan: Plan, labels: Mapping[str, Tier] = MappingProxyType({})) -> None:
        """Move what must move, unless the veto refuses; where that fails the plan before is carried
        out again.
        """
        self.veto.check_plan(plan)
        with torch.inference_mode(mode=False), torch.no_grad():
            try:
                self._residency.apply(plan, self._schedule)
            except BaseException as error:
                try:
                    self._residency.apply(self.plan, self._schedule)
                except BaseException as again:
                    self._broken = (
                        f"weights could not be moved ({error}), nor back ({again}): free memory "
                        "or disk and set another budget, or detach"
                    )
                raise
        self._broken = None
        self.veto.adopt(plan)
        self.plan, self._labels = plan, labels
        for group in self._residency.groups:
            for block in group.blocks:
                self._recorder.blocks[block.name].tier = str(self._tier_of(group, block))
        self._recorder.change_resident(
            self._residency.resident_bytes() - self._recorder.resident_bytes
        )

    def _step_down(self, error: BaseException) -> None:
        """Take less fast memory after an out-of-memory, so that the next forward has room."""
        tiers = {str(tier): size for tier, size in self.plan.budget.items()} or {"SSD": None}
        smaller = int(self.plan.fast_bytes * _STEP_DOWN)
        try:
            self._carry_out(self._make_plan({**tiers, "HBM": smaller}, self._schedule))
        except Exception as refusal:  # raised from a hook, it would hide the out-of-memory
            error.add_note(f"the runtime can't do with less fast memory: {refusal}")
            return
        message = (
            f"out of memory: the runtime now takes {format_bytes(self.plan.fast_bytes)} of fast "
            "memory and goes on; run the forward again"
        )
        error.add_note(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)

    def _note_use(self, group: str) -> None:
        """Trace a use of weights outside the modules that own them."""
        users = (hook for hook, _ in self._held if not hook.lookup)
        if not any(group == own.name for hook in users for own in hook.groups):
            self._trace.append(Step(group))
        placement = self.plan.placements[group]
        self._unplanned |= placement.tier is not Tier.HBM and not placement.unit_bytes

    def _plan_again(self) -> None:
        """Give a slot to weights that were used whole, so that they stay within the budget."""
        try:
            self._carry_out(self._make_plan(self.budget, self._schedule))
        except Exception as refusal:  # the forward itself has gone well
            self._final_plan = self.plan
            warnings.warn(
                "an embedding is used whole, without a module: each use takes memory above the "
                f"budget ({refusal})",
                RuntimeWarning,
                stacklevel=2,
            )

    def _tier_of(self, group: Group, block: Block) -> Tier:
        return self._labels.get(block.name, self.plan.placements[group.name].tier)

    def _bytes_per_tier(self) -> dict[str, int]:
        if not self._labels:
            return {str(tier): size for tier, size in self._residency.bytes_per_tier().items()}
        totals: dict[str, int] = {}
        for name, tier in self._labels.items():
            totals[str(tier)] = totals.get(str(tier), 0) + self._blocks[name].num_bytes
        return totals


class _GroupHook:
    """The pair of hooks on one module, for the groups whose weights its forward uses."""

    def __init__(self, runtime: Runtime, groups: list[Group]) -> None:
        self._runtime = runtime
        self.groups = groups
        self.lookup = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(group.name for group in self.groups)})"

    def install(self, module: nn.Module, handles: list[RemovableHandle]) -> None:
        self.lookup = isinstance(module, nn.Embedding)
        # In front of a user's own hooks: they find the weights there, and one that raises leaves
        # our pair balanced.
        handles.append(
            module.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True)
        )
        handles.append(module.register_forward_hook(self._after, always_call=True))

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._runtime._acquire(self, module)
        # Also inputs that come from elsewhere: a user's hook, layers that are called one by one.
        if torch.is_grad_enabled() and (
            requires_grad((args, kwargs)) or self._runtime._wants_gradients(self)
        ):
            raise PlacementError(f"inputs or weights require gradients, {NO_GRADIENTS}")

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        self._runtime._release(self, module)


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


def refuse_managed(model: nn.Module) -> None:
    """Raise PlacementError where this or another offloader manages the model, InputError where it
    is compiled.
    """
    if any(
        "_orig_mod" in module._modules or module._compiled_call_impl is not None
        for module in model.modules()
    ):
        raise InputError("the model is compiled (torch.compile): attach to the uncompiled model")
    for name, module in model.named_modules():
        place = f"module {name!r}" if name else "the model"
        if module in _attached:
            raise PlacementError(f"{place} is attached already: detach its runtime first")
        if hasattr(module, "_hf_hook"):
            raise PlacementError(
                f"{place} is managed by Accelerate: remove_hook_from_submodules(model) first, or "
                "load without device_map"
            )
        if hasattr(module, "_diffusers_hook"):
            raise PlacementError(
                f"{place} has Diffusers hooks (group offloading): remove them first"
            )


@torch.compiler.disable  # type: ignore[untyped-decorator]  # run, not traced: its error goes out
def _refuse_compile() -> None:
    raise PlacementError(
        "torch.compile can't trace a model whose weights come and go: detach it, or call the "
        "uncompiled model"
    )


def _refuse_apply(*args: Any, **kwargs: Any) -> None:
    raise PlacementError(
        "the model's weights are placed by a runtime: detach it before moving, converting or "
        "loading the model"
    )


def _refuse_state_dict(*args: Any) -> None:
    raise PlacementError(
        "weights are held compressed, and a state_dict would have them for good: detach first"
    )


def _is_out_of_memory(error: BaseException) -> bool:
    """Say whether memory has run out, as torch says it on a device and on the CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate" in str(error)
    )
