"""Packed experts: the parameters of one module, of which every expert has a slice and is a group by
itself.

Where all experts are in fast memory as they are, the parameters are plain ones and the module
computes as ever. Otherwise stand-ins take their place, and an expert's weights are in memory of its
own for as long as it resides or is cached (``experts``); the module then computes with those that a
token is routed to (``hooks.experts``).
"""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass

from ...codecs.kernels import CompressedWeight
from ...errors import PlacementError
from ...policy.plan import Plan
from ...vocabulary import Tier
from ..payload.contents import flat_bytes
from ..payload.groups import routed_experts
from ..payload.layout import Payload
from ..payload.parts import Part
from ..stores import byte_view
from .archive import Archive, Stored
from .fast_memory import FastMemory
from .held import HeldGroup
from .originals import Originals
from .stand_ins import Away, OffloadedParameter, WeightOps, plain_tensors, set_away, set_weights
from .weights import GroupWeights, Lost

ExpertWeight = Tensor | CompressedWeight
"""One expert's slice of a parameter."""

PACKED: "weakref.WeakKeyDictionary[nn.Module, PackedExperts]" = weakref.WeakKeyDictionary()
"""The modules whose experts a runtime holds apart."""


class PackedExperts:
    """The experts of one module. Used by one thread at a time."""

    def __init__(self, module: nn.Module, originals: Originals, memory: FastMemory) -> None:
        self.module = module
        self.memory = memory
        self.experts: list[HeldExpert] = []
        self.routed = routed_experts(module, next(module.parameters()).shape[0])
        """How many experts a token takes."""
        self.is_plain = True
        """The parameters are plain ones."""
        config: Any = module.config
        self.config = config
        self.implementation: str = config._experts_implementation
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

    def add(self, payload: Payload, archive: Archive, originals: Originals) -> "HeldExpert":
        """Return the group of the next expert."""
        expert = HeldExpert(payload, self.memory, archive, originals, self)
        self.experts.append(expert)
        return expert

    # -- placing -----------------------------------------------------------------------------------

    def begin(self, plan: Plan) -> None:
        """Hear of the plan that is carried out next."""
        self._made.clear()
        self._whole = all(
            plan.placements[each.name].tier is Tier.HBM and not each.payload.lossy
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
            for name, (whole, _) in self._made.items():
                set_weights(self._originals.parameters[name], whole)
                self._originals.stored.pop(name, None)
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
        self.config._experts_implementation = self.implementation
        PACKED.pop(self.module, None)

    # -- reading -----------------------------------------------------------------------------------

    def tensor(self, expert: int, name: str) -> Tensor:
        """Return the raw slice of a parameter that is in fast memory."""
        if name in self._made:
            return self._made[name][0][expert]
        if self.is_plain:
            return self._originals.parameters[name].data[expert]
        weight = self.held[expert][name]
        assert isinstance(weight, Tensor)
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

    def _take_away(self, part: Part) -> None:
        name = part.parameter
        if not self._originals.from_checkpoint:
            self._originals.stored[name] = lambda start, end: self.read(name, start, end)
        away = _AwayExperts(self, part, self._originals.shapes[name])
        placeholder = torch.empty(0, dtype=part.dtype, device=self.memory.device)
        set_away(self._originals.parameters[name], away, placeholder=placeholder)


class HeldExpert(HeldGroup):
    """One expert of a packed module, in its place. It comes when tokens are routed to it."""

    def __init__(
        self,
        payload: Payload,
        memory: FastMemory,
        archive: Archive,
        originals: Originals,
        packed: PackedExperts,
    ) -> None:
        super().__init__(payload, memory, archive, originals)
        assert payload.group.expert is not None
        self.packed = packed
        self.number = payload.group.expert
        self._slices = _ExpertWeights(self, originals, memory)
        self.weights = self._slices

    @property
    def is_routed(self) -> bool:
        """It comes when tokens are routed to it, and at no module's hook."""
        return not self.packed.is_plain

    def read_original(self, name: str) -> Tensor:
        """Return its slice of an original parameter, in host memory."""
        if self.native is not None:
            return self.archive.original(*self.native, name, None, None)
        if self.stored is not None and not self.payload.lossy:
            return self.archive.original(self.stored, self.payload, name, None, None)
        return self.packed.tensor(self.number, name).cpu()

    def expand(self, name: str) -> Tensor:
        """Return its slice of a parameter as it is held."""
        part = next(part for part in self.payload.parts if part.parameter == name)
        weight = self.packed.held.get(self.number, {}).get(name)
        if weight is None:
            if self.stored is None:
                raise PlacementError(f"weights of {self.name} are being moved: wait for the end")
            stored = self.archive.weights(self.stored, self.payload, lambda _: self.memory.device)
            weight = next(
                self._slices.prepared(each, data) for each, data in stored if each == part
            )
        if isinstance(weight, Tensor):
            return weight
        return weight.expand(0, part.rows).view(part.shape)

    def restore(self) -> None:
        """Bring the original weights home for good."""
        if self._originals.from_checkpoint or self.packed.is_plain or self.tier is None:
            return
        for part in self.payload.parts:
            name = part.parameter
            home = self._originals.home(name)
            self.packed.give_back(self.number, part, self.read_original(name), home)
        self.native, self.stored, self.tier = None, None, None
        self.units = ()

    def _note_originals(self) -> None:
        """All experts' are read by ``PackedExperts.read``."""


class _ExpertWeights(GroupWeights):
    """One expert's slices of the parameters."""

    def __init__(self, expert: HeldExpert, originals: Originals, memory: FastMemory) -> None:
        super().__init__(expert.payload, originals, memory, expert.stand_in)
        self._packed = expert.packed
        self._number = expert.number

    @property
    def compressed_bytes(self) -> int:
        """The packed module counts what its experts take."""
        return 0

    def contents(self) -> str:
        """Return a key for what its slices have in memory now."""
        digest = xxhash.xxh3_128()
        for part in self.payload.parts:
            weight = self._packed.tensor(self._number, part.parameter)
            digest.update(byte_view(flat_bytes(weight.cpu())))
        return digest.hexdigest()

    def take_over(self) -> None:
        """Take its slices of the weights that were given."""
        for part in self.payload.parts:
            data = self._originals.read(part.parameter, self._number, self._number + 1)[0]
            self._packed.hold(self._number, part, data.to(self._memory.device, copy=True))

    def load(self, archive: Archive, stored: Stored) -> None:
        """Read its stored payload into memory of its own."""
        device = self._memory.device
        for part, data in archive.weights(stored, self.payload, lambda name: device):
            self._packed.hold(self._number, part, self.prepared(part, data))

    def prepared(self, part: Part, data: Tensor) -> ExpertWeight:
        """Return what computes with a part's bytes: raw weights, or a record."""
        return data if part.record is None else self._prepare(part, data)

    def hide(self, ops: WeightOps | None = None) -> None:
        """Let its weights go from fast memory."""
        self._packed.drop(self._number)

    def give_back(self, weights: Iterable[tuple[Part, Tensor]]) -> None:
        """Bring its slices home."""
        for part, given in weights:
            home = self._originals.home(part.parameter)
            self._packed.give_back(self._number, part, given, home)

    def forbid(self, reason: object, *, all_parts: bool = True) -> None:
        """Let nothing compute with parameters that miss its slices; not ``all_parts``: they are
        lost.
        """
        self._packed.drop(self._number)
        if not all_parts:
            self._packed.forbid(reason)

    def _reside(self, part: Part, weight: CompressedWeight) -> None:
        self._packed.hold(self._number, part, weight)

    def _set(self, part: Part, weights: Tensor) -> None:
        self._packed.hold(self._number, part, weights)


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
