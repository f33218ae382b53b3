"""attach(): the hook layer that runs any module under a plan, and takes itself off again without a
trace.

Every block's module gets a forward pre-hook that acquires the block and a post-hook that releases
it, also when the forward raises. What "acquire" does is the residency's business: move weights
(transfer.py) or charge time (emulation.py).
"""

import contextlib
import threading
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..blocks import Block, parameter_digest, partition_model, tied_modules, unwrap_model
from ..errors import InputError, PlacementError
from ..hints import Hints, Tier, hints_from_json, load_hints, match_hints
from .emulation import EmulatedResidency
from .specs import Clock, EmulationSpec
from .telemetry import BlockStats, Recorder, Stats
from .transfer import RealResidency

Mode = Literal["real", "emulated"]

_attached: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
"""Modules of models that a runtime holds; weak, so that a forgotten model is freed."""


class Residency(Protocol):
    """What the hooks ask for: weights of a block, for as long as its module runs."""

    virtual_seconds: float

    def acquire(self, block: Block) -> tuple[int, float]:
        """Make a block's weights usable; returns bytes moved and virtual seconds charged."""

    def release(self, block: Block) -> None:
        """End one use of a block."""

    def resident_bytes(self) -> int:
        """Measure the weight bytes in fast memory."""

    def wait_error(self) -> dict[str, float] | None:
        """Say how well emulated waits were met."""

    def reset(self) -> None:
        """Start the statistics anew."""

    def close(self) -> None:
        """Restore the model."""


def attach(
    model: nn.Module,
    hints: Hints | Mapping[str, Any] | str | Path,
    *,
    mode: Mode,
    emulation: EmulationSpec | None = None,
    spill_dir: str | Path | None = None,
    device: str | torch.device | None = None,
) -> "Runtime":
    """Place a model's weights by its hints and return the runtime, which is also a context manager
    that detaches.

    ``hints`` is a Hints, a parsed document of either form, or a file. ``device`` is where the model
    computes (default: where its first parameter is); ``spill_dir`` holds the SSD tier (default: a
    temporary folder on a disk). The model is for inference while attached: gradients are refused in
    real mode. ``forward`` and ``generate`` keep their signatures.

    Raises InputError for hints that don't fit the model, a tier that the mode can't serve, and a
    spill folder that is memory; PlacementError for a model that this or another offloader manages
    already. The model is then as it was.
    """
    if mode not in ("real", "emulated"):
        raise InputError(f"mode {mode!r} is unknown; allowed: real, emulated")
    if mode == "real" and emulation is not None:
        raise InputError(
            "an emulation spec has no effect in real mode: leave it out, or use mode='emulated'"
        )
    if mode == "emulated" and spill_dir is not None:
        raise InputError(
            "a spill_dir has no effect in emulated mode: leave it out, or use mode='real'"
        )
    _refuse_managed(model)
    model = unwrap_model(model)
    blocks = partition_model(model)
    if isinstance(hints, str | Path):
        hints = load_hints(hints)
    elif not isinstance(hints, Hints):
        hints = hints_from_json(hints)
    digest = parameter_digest(model) if hints.model is not None else None
    matched = match_hints(
        hints,
        [block.name for block in blocks],
        parameter_digest=digest,
        tied=tied_modules(blocks),
    )
    tiers = {name: hint.tier for name, hint in matched.items()}
    compute_device = _resolve_device(model, device)
    residency: Residency
    if mode == "real":
        folder = Path(spill_dir) if spill_dir is not None else None
        with _outside_inference_mode():
            residency = RealResidency(model, blocks, tiers, device=compute_device, spill_dir=folder)
    else:
        residency = EmulatedResidency(model, tiers, emulation or EmulationSpec(), compute_device)
    return Runtime(
        model, blocks, tiers, residency, mode=mode, emulation=emulation, device=compute_device
    )


class Runtime:
    """A model under a plan; a context manager that detaches. Runs one forward at a time."""

    def __init__(
        self,
        model: nn.Module,
        blocks: tuple[Block, ...],
        tiers: Mapping[str, Tier],
        residency: Residency,
        *,
        mode: Mode,
        emulation: EmulationSpec | None,
        device: torch.device,
    ) -> None:
        self.mode = mode
        self.clock = Clock.WALL if mode == "real" else (emulation or EmulationSpec()).clock
        self._model = model
        self._blocks = {block.name: block for block in blocks}
        self._residency = residency
        self._lock = threading.RLock()
        self._held: list[list[Block]] = []
        self._handles: list[RemovableHandle] = []
        self._thread: threading.Thread | None = None
        self._detached = False
        self._recorder = Recorder(
            device=device,
            blocks={
                block.name: BlockStats(tier=str(tiers[block.name]), num_bytes=block.num_bytes)
                for block in blocks
            },
            resident_bytes=residency.resident_bytes(),
            virtual=self.clock is Clock.VIRTUAL,
        )
        self._recorder.reset()
        if isinstance(residency, RealResidency):
            residency.on_resident_change = self._recorder.change_resident
            residency.on_demand = self._recorder.count_on_demand
        self._install()
        for module in model.modules():
            _attached.add(module)
            # to(), half(), cuda(): Module._apply would convert the resident half of the model and
            # then fail.
            module.__dict__["_apply"] = _refuse_apply

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
    def virtual_seconds(self) -> float:
        """Emulated time charged on the virtual clock since attach or the last reset; 0 where time
        is really spent.
        """
        return self._residency.virtual_seconds

    def stats(self) -> Stats:
        """Return what happened since attach or the last reset; waits for a GPU."""
        with self._lock:
            return self._recorder.snapshot(
                mode=self.mode, clock=str(self.clock), wait_error=self._residency.wait_error()
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
            for handle in self._handles:
                handle.remove()
            self._handles.clear()
            for module in self._model.modules():
                _attached.discard(module)
                module.__dict__.pop("_apply", None)
            self._release_all()
            with _outside_inference_mode():
                self._residency.close()
            self._detached = True

    def _install(self) -> None:
        users: dict[str, list[Block]] = {}
        for block in self._blocks.values():
            for module_name in block.modules:
                users.setdefault(module_name, []).append(block)
        for module_name, blocks in users.items():
            _BlockHook(self, blocks).install(self._model.get_submodule(module_name), self._handles)
        # Last and in front: it sees each forward begin before any block is acquired.
        begin = self._model.register_forward_pre_hook(
            self._begin_forward, prepend=True, with_kwargs=True
        )
        end = self._model.register_forward_hook(self._end_forward, always_call=True)
        self._handles += [begin, end]

    def _begin_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.mode == "real" and torch.is_grad_enabled() and _requires_grad((args, kwargs)):
            raise PlacementError(
                "inputs require gradients, but offloaded weights serve inference only: use "
                "torch.no_grad() or detach"
            )
        with self._lock:
            thread = threading.current_thread()
            if self._thread not in (None, thread) and self._thread.is_alive():
                raise PlacementError("another thread runs the model: one forward at a time")
            self._thread = thread
            # KeyboardInterrupt skips post-hooks: give back what an interrupted forward held.
            self._release_all()
            self._recorder.forwards += 1

    def _end_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._thread is threading.current_thread():
            self._thread = None

    def _acquire(self, blocks: list[Block]) -> None:
        held: list[Block] = []
        with self._lock:
            self._held.append(held)
            for block in blocks:
                self._recorder.begin_transfer(block.name)
                moved_bytes, charged = 0, 0.0
                try:
                    moved_bytes, charged = self._residency.acquire(block)
                    held.append(block)
                finally:
                    self._recorder.end_transfer(block.name, moved_bytes, charged)
                    if block not in held:
                        self._recorder.end_compute()

    def _release(self) -> None:
        with self._lock:
            if not self._held:
                return
            for block in reversed(self._held.pop()):
                self._recorder.end_compute()
                self._residency.release(block)

    def _release_all(self) -> None:
        while self._held:
            self._release()


class _BlockHook:
    """The pair of hooks on one module, for the blocks whose weights its forward uses."""

    def __init__(self, runtime: Runtime, blocks: list[Block]) -> None:
        self._runtime = runtime
        self._blocks = blocks

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(block.name for block in self._blocks)})"

    def install(self, module: nn.Module, handles: list[RemovableHandle]) -> None:
        # In front of a user's own hooks: they find the weights there, and one that raises leaves
        # our pair balanced.
        handles.append(module.register_forward_pre_hook(self._before, prepend=True))
        handles.append(module.register_forward_hook(self._after, always_call=True))

    def _before(self, module: nn.Module, args: Any) -> None:
        self._runtime._acquire(self._blocks)

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        self._runtime._release()


def _refuse_managed(model: nn.Module) -> None:
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


@contextlib.contextmanager
def _outside_inference_mode() -> Iterator[None]:
    """Make ordinary tensors: weights made in inference mode could never be trained again."""
    with torch.inference_mode(mode=False), torch.no_grad():
        yield


def _refuse_apply(*args: Any, **kwargs: Any) -> None:
    raise PlacementError(
        "the model's weights are placed by a runtime: detach it before moving or converting the "
        "model"
    )


def _resolve_device(model: nn.Module, device: str | torch.device | None) -> torch.device:
    """Return the compute device with its index, so that it compares equal to a tensor's device."""
    if device is None:
        return next(model.parameters()).device
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device {str(device)!r} can't be used here: {str(error).splitlines()[0]}"
        ) from error


def _requires_grad(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.requires_grad
    if isinstance(value, list | tuple):
        return any(_requires_grad(item) for item in value)
    return isinstance(value, dict) and any(_requires_grad(item) for item in value.values())
