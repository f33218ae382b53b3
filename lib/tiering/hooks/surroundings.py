"""What is set on a model's modules under a plan, and taken from them without a trace."""

import contextlib
import warnings
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...errors import PlacementError
from ..residency.held import HeldGroup
from ..residency.listed import ListedExpert
from ..residency.residency import Residency
from ..residency.stand_ins import NO_GRADIENTS, requires_grad
from .calls import Calls, Context
from .compiled import CompiledDecoding, compile_piece
from .direct import DirectForwards
from .fast_path import EncoderPaths
from .group_hook import GroupHook
from .guards import Guards, SaveState
from .listed import ExpertHook, LayerHook
from .managed import attached
from .streamed_step import StreamedStep
from .tracing import raise_compiling, refuse_tracing

if TYPE_CHECKING:
    from .forwards import Forwards


class Surroundings:
    """Hooks of the modules whose weights move, forwards of those that are held compressed, and what
    is the same under every plan.
    """

    def __init__(
        self,
        forwards: "Forwards",
        model: nn.Module,
        residency: Residency,
        *,
        save_state: SaveState,
        generation: Context,
    ) -> None:
        self.hooked: frozenset[str] = frozenset()
        """The groups whose modules are surrounded."""
        self.moves = False
        """Weights come and go: a compiled graph would keep them."""
        self.decoding: CompiledDecoding | None = None
        self._said: set[str] = set()
        """Why decoding isn't compiled, as far as it was said."""
        self._obstacle: str | None = None
        """Why under the present plan."""
        self._moving: frozenset[str] = frozenset()
        self._forwards = forwards
        self._model = model
        self._residency = residency
        self._calls = Calls()
        """What is the same under every plan."""
        self._always: set[str] = set()
        """The modules whose hooks are among it."""
        self._hooks: dict[str, GroupHook] = {}
        """Of the other modules that compute with weights, by their names."""
        self._hook_calls = Calls()
        self._direct = DirectForwards()
        for module in model.modules():
            attached.add(module)
        self._guards = Guards(model, save_state, self.refuse_compiling)
        self._surround(generation)
        self._set_hooks()

    @property
    def traced(self) -> set[str]:
        """The groups whose uses are traced: not those of what comes by routing."""
        groups = self._residency.groups
        return {name for name in self.hooked if not groups[name].is_routed}

    def remove(self) -> None:
        """Let the model run as before."""
        if self.decoding is not None:
            self.decoding.remove()
        self._hook_calls.remove()
        self._calls.remove()
        self._direct.remove()
        self._drop_compiled_calls()
        for module in self._model.modules():
            attached.discard(module)
        self._guards.remove()

    def follow(self, hooked: Collection[str]) -> bool:
        """Surround the modules of these groups, and no others; returns whether that is a change."""
        self._direct.follow(self._model, self._residency.groups.values())
        self.moves = self._residency.emulated or self._residency.moves
        if self.decoding is not None:
            self.decoding.follow()
            self._look_for_obstacle()
        changes = self.hooked != frozenset(hooked)
        if changes:
            self.hooked = frozenset(hooked)
            self._set_hooks()
        if self.moves and self._drop_compiled_calls():
            warnings.warn(
                "weights come and go from here on: what model.compile() has compiled runs as it is",
                RuntimeWarning,
                stacklevel=4,
            )
        return changes

    def hook_all(self) -> bool:
        """Surround the modules of all groups, also while the model runs in another thread: nothing
        is taken off. Returns whether that is a change.
        """
        before, self.hooked = self.hooked, frozenset(self._residency.groups)
        for hook in self._hooks.values():
            if not any(group.name in before for group in hook.groups):
                self._hook_calls.surround(hook.module, hook)
        return before != self.hooked

    def compile_decoding(self) -> None:
        """Compile steps of decoding from here on."""
        if self.decoding is None:
            streamed = StreamedStep(
                self._residency,
                self._hooks.values(),
                as_resident=self._as_resident,
                undisturbed=self._forwards.requests.postponed,
                compile=compile_piece,
            )
            self.decoding = CompiledDecoding(
                self._model, streamed, streams=lambda: self.moves, may_compile=self._may_compile
            )
        self._look_for_obstacle()

    def _may_compile(self) -> bool:
        """Say whether a step may be compiled now: what is surrounded comes to slots, of which
        nobody has views.
        """
        if not self.moves:
            return True
        comes = self._obstacle is None and self.hooked == self._moving
        return comes and not self._residency.memory.prefetcher.lent

    def _look_for_obstacle(self) -> None:
        """Find out why steps can't be compiled under the present plan, and say it once."""
        self._moving = frozenset(group.name for group in self._residency.moving)
        self._obstacle = self._find_obstacle() if self.moves else None
        if self._obstacle not in (None, *self._said):
            self._said.add(str(self._obstacle))
            warnings.warn(
                f"decoding isn't compiled under this plan: {self._obstacle}",
                RuntimeWarning,
                stacklevel=5,
            )

    def _find_obstacle(self) -> str | None:
        residency = self._residency
        if residency.emulated:
            return "time is emulated, and charged for each module"
        apart = [each.name for each in residency.packed if not each.is_plain]
        apart += [each.name for each in residency.listed if each.is_below]
        if apart:
            return f"the experts of {apart[0]} are computed one by one, by what is routed to"
        hooked = {group.name for hook in self._hooks.values() for group in hook.groups}
        whole = sorted(self._moving - hooked)
        return f"{whole[0]} takes all weights inside it at once" if whole else None

    @contextlib.contextmanager
    def _as_resident(self) -> Iterator[None]:
        """Let weights that stand for those that are away be computed with as if they resided."""
        self._direct.follow(self._model, self._residency.groups.values())
        moves, self.moves = self.moves, False
        try:
            yield
        finally:
            self.moves = moves
            for group in self._residency.moving:
                group.weights.compressed.clear()
            self._direct.follow(self._model, self._residency.groups.values())

    def is_compiled(self) -> bool:
        """Say whether torch.compile traces the present call; raises as ``refuse_compiling``."""
        if not torch.compiler.is_dynamo_compiling():
            return False
        self.refuse_compiling()
        return True

    def refuse_compiling(self) -> None:
        """Raise PlacementError where weights come and go, and for an export, which is for good."""
        if self.moves or torch.compiler.is_exporting():
            raise_compiling()

    def _set_hooks(self) -> None:
        """Surround the modules of hooked groups, and the parts of the model that have them inside:
        each may be called by itself (a base model, an encoder, a layer).
        """
        self._hook_calls.remove()
        users = set(self._always)
        for name, hook in self._hooks.items():
            if any(group.name in self.hooked for group in hook.groups):
                self._hook_calls.surround(hook.module, hook)
                users.add(name)
        for listed in self._residency.listed:
            if listed.is_below:
                layer = self._model.get_submodule(listed.name.rpartition(".")[0])
                self._hook_calls.surround(layer, LayerHook(listed))
        for name in _containers(users):
            module = self._model.get_submodule(name)
            self._hook_calls.surround(module, _Part(self._forwards, module))

    def _surround(self, generation: Context) -> None:
        """Set what every plan needs, and make the hooks of what may move under some."""
        users: dict[str, list[HeldGroup]] = {}
        for group in self._residency.groups.values():
            for module_name in group.payload.group.modules:
                users.setdefault(module_name, []).append(group)
        encoders = EncoderPaths(self._calls, trains=self._residency.trains)
        for module_name, groups in users.items():
            module = self._model.get_submodule(module_name)
            kind = ExpertHook if isinstance(groups[0], ListedExpert) else GroupHook
            hook = kind(self._forwards, module, groups)
            if isinstance(module, nn.TransformerEncoderLayer):
                encoders.add_layer(module, hook.hold)
                self._always.add(module_name)
            elif isinstance(module, nn.MultiheadAttention) or module is self._model:
                self._calls.surround(module, hook)  # what is around it must stay around it
                self._always.add(module_name)
            else:
                self._hooks[module_name] = hook
        encoders.add_others(self._model)
        self._calls.surround(self._model, _Part(self._forwards, None))
        if callable(getattr(self._model, "generate", None)):
            self._calls.run_within(self._model, generation, method="generate")

    def _drop_compiled_calls(self) -> bool:
        """Undo what model.compile() has set since attach; returns whether there was any."""
        set_here = [
            vars(module).pop("_compiled_call_impl", None) for module in self._model.modules()
        ]
        return any(call is not None for call in set_here)


class _Part:
    """Begins and ends forwards around the calls of the model (None), or of a part of it."""

    def __init__(self, forwards: "Forwards", module: nn.Module | None) -> None:
        self._forwards = forwards
        self._module = module

    def passes(self) -> bool:
        """Say that the part is called within a forward, or compiled where nothing moves."""
        forwards = self._forwards
        if forwards.around.is_compiled() or (self._module is not None and forwards.is_mine):
            return True
        refuse_tracing()
        return False

    def enter(self, call: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._module is None and torch.is_grad_enabled() and requires_grad((args, kwargs)):
            raise PlacementError(f"inputs require gradients, {NO_GRADIENTS}")
        self._forwards.enter(call, self._module)

    def leave(self, call: object, failure: BaseException | None) -> None:
        self._forwards.leave(call, failure)


def _containers(users: Collection[str]) -> list[str]:
    """Name the modules, but for the model itself, that have users of weights inside them."""
    names: dict[str, None] = {}
    for user in users:
        parts = user.split(".")
        names |= dict.fromkeys(".".join(parts[:end]) for end in range(1, len(parts)))
    return [name for name in names if name not in users]
