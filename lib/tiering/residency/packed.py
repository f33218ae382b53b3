"""Packed experts: the parameters of one module, of which every expert has a slice and is a group by
itself.

Where all experts are in fast memory as they are, the parameters are plain ones and the module
computes as ever. Otherwise stand-ins take their place, and an expert's weights are in memory of its
own for as long as it resides or is cached (``experts``); the module then computes with those that a
token is routed to (``hooks.experts``).
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass

from ...blocks import EXPERTS_IMPLEMENTATION, routed_experts
from ...errors import PlacementError
from ...policy.plan import Plan
from ...vocabulary import Tier
from ..payload.layout import Payload
from ..payload.parts import Part
from .archive import Archive
from .fast_memory import FastMemory
from .held_expert import ExpertWeight, HeldExpert
from .originals import Originals
from .stand_ins import Away, OffloadedParameter, WeightOps, plain_tensors, set_away, set_weights
from .weights import Lost

_DEFAULT = "grouped_mm"
"""Of transformers."""
PACKED: "weakref.WeakKeyDictionary[nn.Module, PackedExperts]" = weakref.WeakKeyDictionary()
"""The modules whose experts a runtime holds apart."""


class PackedExperts:
    """The experts of one module. Used by one thread at a time."""

    def __init__(self, name: str, originals: Originals, memory: FastMemory) -> None:
        self.name = name
        module = self.module = originals.model.get_submodule(name)
        self.memory = memory
        self.experts: list[HeldExpert] = []
        num_experts = next(module.parameters()).shape[0]
        self.routed = routed_experts(originals.model, name, num_experts)
        """How many experts a token takes."""
        self.is_plain = True
        """The parameters are plain ones."""
        self.config: Any = module.config
        self.implementation = _join(self.config)
        """What the module computes by while they are."""
        self.compute: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
        """What the module computes with while they are not: from hidden, index and weights."""
        self.held: dict[int, dict[str, ExpertWeight]] = {}
        """Experts that reside while the parameters are away: their weights by parameter."""
        self._originals = originals
        self._whole = False
        """The plan that is being carried out makes the parameters plain ones."""
        self._made: dict[str, tuple[Tensor, set[int]]] = {}
        """Parameters that are being put together, and the experts that they have by now."""
        PACKED[module] = self

    def add(self, payload: Payload, archive: Archive) -> HeldExpert:
        """Return the group of the next expert."""
        expert = HeldExpert(payload, self.memory, archive, self._originals, self)
        self.experts.append(expert)
        return expert

    # -- placing -----------------------------------------------------------------------------------

    def begin(self, plan: Plan, payloads: Mapping[str, Payload]) -> None:
        """Hear of the plan that is carried out next. What one that failed has put together stays as
        experts that are held apart.
        """
        for name, (whole, there) in self._made.items():
            for expert in sorted(there):
                self.held.setdefault(expert, {})[name] = whole[expert].clone()
        self._made.clear()
        self._whole = all(
            plan.placements[each.name].tier is Tier.HBM and not payloads[each.name].lossy
            for each in self.experts
        )

    def hold(self, expert: int, part: Part, weight: ExpertWeight) -> None:
        """Have an expert's slice in fast memory, in a parameter that is put together or apart."""
        if not self._whole:
            self.held.setdefault(expert, {})[part.parameter] = weight
            return
        assert isinstance(weight, Tensor)
        self._fill(expert, part, weight, self.memory.device)

    def drop(self, expert: int) -> None:
        """Let an expert's weights go from fast memory."""
        self.held.pop(expert, None)

    def settle(self) -> None:
        """Let the parameters be what the plan made of them."""
        if self._whole:
            for part in self.experts[0].payload.parts:
                if self._made or not self.is_plain:
                    set_weights(
                        self._originals.parameters[part.parameter], self._put_together(part)
                    )
                    self._originals.stored.pop(part.parameter, None)
            self._made.clear()
            self.held.clear()
        else:
            for part in self.experts[0].payload.parts:
                self._take_away(part)
        self.is_plain = self._whole
        for each in self.experts:
            each.weights.note_versions()

    def give_back(self, expert: int, part: Part, weight: Tensor, home: torch.device) -> None:
        """Bring an expert's slice home; the parameter is a plain one once it has all of them."""
        self._fill(expert, part, weight, home)
        whole, there = self._made[part.parameter]
        if len(there) == len(self.experts):
            set_weights(self._originals.parameters[part.parameter], whole)
            del self._made[part.parameter]

    def forbid(self, reason: object) -> None:
        """Let nothing compute with parameters that are away, since they could not be restored."""
        for part in self.experts[0].payload.parts:
            parameter = self._originals.parameters[part.parameter]
            if isinstance(parameter, OffloadedParameter):
                shape = self._originals.shapes[part.parameter]
                away = Lost(shape, self.experts[0].name.rpartition(".")[0], reason)
                set_away(parameter, away, placeholder=torch.empty(0, dtype=part.dtype))

    def resident_bytes(self) -> int:
        """Return the bytes of experts that reside beside the parameters."""
        total = 0
        for weights in self.held.values():
            for weight in weights.values():
                total += weight.nbytes if isinstance(weight, Tensor) else weight.num_bytes
        return total

    def leave(self) -> None:
        """Let the module compute as before."""
        if PACKED.pop(self.module, None) is not None:
            _leave(self.config)

    # -- reading -----------------------------------------------------------------------------------

    def tensor(self, expert: int, name: str) -> Tensor:
        """Return the raw slice of a parameter that is in fast memory; raises PlacementError where
        it isn't.
        """
        whole, there = self._made.get(name, (None, frozenset[int]()))
        if whole is not None and expert in there:
            return whole[expert]
        if self.is_plain:
            return self._originals.parameters[name].data[expert]
        weight = self.held.get(expert, {}).get(name)
        if not isinstance(weight, Tensor):
            raise PlacementError(
                f"the weights of {self.experts[expert].name} are not in fast memory: set another "
                "budget, or detach"
            )
        return weight

    def read(self, name: str, start: int | None, end: int | None) -> Tensor:
        """Read the original weights of some experts, to host memory."""
        experts = self.experts[slice(start, end)]
        return torch.stack([each.read_original(name) for each in experts])

    def expand(self, part: Part, device: torch.device) -> Tensor:
        """Put a parameter together from what its experts are held as."""
        shape = self._originals.shapes[part.parameter].shape
        whole = torch.empty(shape, dtype=part.dtype, device=device)
        for number, each in enumerate(self.experts):
            whole[number] = each.expand(part.parameter)
        return whole

    def _fill(self, expert: int, part: Part, weight: Tensor, device: torch.device) -> None:
        if part.parameter not in self._made:
            shape = self._originals.shapes[part.parameter].shape
            self._made[part.parameter] = (
                torch.empty(shape, dtype=part.dtype, device=device),
                set(),
            )
        whole, there = self._made[part.parameter]
        whole[expert] = weight
        there.add(expert)

    def _put_together(self, part: Part) -> Tensor:
        """Return a whole parameter, of what came for it and what was in fast memory before; raises
        PlacementError where an expert's slice is nowhere.
        """
        name, there = part.parameter, self._made.get(part.parameter, (None, set()))[1]
        for expert in range(len(self.experts)):
            if expert not in there:
                self._fill(expert, part, self.tensor(expert, name), self.memory.device)
        return self._made[name][0]

    def _take_away(self, part: Part) -> None:
        name = part.parameter
        if not self._originals.from_checkpoint:
            self._originals.stored[name] = lambda start, end: self.read(name, start, end)
        away = _AwayExperts(self, part, self._originals.shapes[name])
        placeholder = torch.empty(0, dtype=part.dtype, device=self.memory.device)
        set_away(self._originals.parameters[name], away, placeholder=placeholder)


def settle(packed: Sequence[PackedExperts]) -> None:
    """Let all modules be what a plan made of them. Where some compute with experts that are held
    apart, all whose config they share ask our implementation.
    """
    for each in packed:
        each.settle()
    for each in packed:
        apart = any(not other.is_plain for other in PACKED.values() if other.config is each.config)
        each.config._experts_implementation = (
            EXPERTS_IMPLEMENTATION if apart else each.implementation
        )


@dataclass(slots=True)
class _Shared:
    """A config that models share: what they compute by, and how many modules of ours have it."""

    config: Any
    implementation: str
    users: int = 0


_SHARED: dict[int, _Shared] = {}
"""By the identity of the config."""


def given_implementation(config: Any) -> str:
    """Return what models of a config compute by when no runtime holds their experts."""
    shared = _SHARED.get(id(config))
    name: str = config._experts_implementation if shared is None else shared.implementation
    return _DEFAULT if name == EXPERTS_IMPLEMENTATION else name  # of a copy made meanwhile


def _join(config: Any) -> str:
    implementation = given_implementation(config)
    _SHARED.setdefault(id(config), _Shared(config, implementation)).users += 1
    return implementation


def _leave(config: Any) -> None:
    shared = _SHARED[id(config)]
    shared.users -= 1
    if not shared.users:
        config._experts_implementation = shared.implementation
        del _SHARED[id(config)]


class _AwayExperts:
    """Stands behind a parameter whose experts are held apart: an operation gets all of them."""

    ops: WeightOps | None = None
    transposed = False

    def __init__(self, packed: PackedExperts, part: Part, shape: Tensor) -> None:
        self.shape = shape
        self._packed = packed
        self._part = part
        self._kept: weakref.ref[Tensor] | None = None
        """What was last given out, to be kept."""

    def prepare(self, whole: Sequence[Away], by_rows: Sequence[Away]) -> bool:
        """There is nothing to make room for in advance."""
        return False

    @contextlib.contextmanager
    def fetch(self) -> Iterator[None]:
        """Put the parameter together for an operation that takes it."""
        memory = self._packed.memory
        parameter = self._packed.experts[0].weights.parameter(self._part)
        num_bytes = self.shape.numel() * self.shape.element_size()
        with memory.watcher.alone(), memory.taking(num_bytes):
            with plain_tensors(), DisableTorchFunctionSubclass():
                set_weights(parameter, self._packed.expand(self._part, memory.device))
            try:
                yield
            finally:
                placeholder = torch.empty(0, dtype=self._part.dtype, device=memory.device)
                set_away(parameter, self, placeholder=placeholder)

    def copy(self) -> Tensor | None:
        """Read the weights, where they are as they were given, into memory that the caller keeps;
        a second caller meanwhile gets the same.
        """
        packed, memory = self._packed, self._packed.memory
        if any(each.payload.lossy for each in packed.experts):
            return None
        with memory.watcher.alone(), plain_tensors(), DisableTorchFunctionSubclass():
            alias = packed.experts[0].weights.parameter(self._part).detach()
            kept = None if self._kept is None else self._kept()
            if kept is not None and kept.device == memory.copy_device:
                alias.data = kept
                return alias
            alias.data = packed.expand(self._part, memory.copy_device)
        self._kept = weakref.ref(alias)
        return alias
