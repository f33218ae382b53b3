"""One expert of a packed module, in its place: a group whose weights are slices of parameters that
it shares with the module's other experts (``packed``).
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import xxhash
from torch import Tensor

from ...codecs.kernels import CompressedWeight, EncodedWeight
from ...errors import PlacementError
from ..payload.contents import flat_bytes, part_view
from ..payload.layout import Payload
from ..payload.parts import Part
from ..stores import byte_view
from .archive import Archive, Stored
from .fast_memory import FastMemory
from .held import HeldGroup
from .originals import Originals
from .stand_ins import WeightOps
from .weights import GroupWeights

if TYPE_CHECKING:
    from .packed import PackedExperts

ExpertWeight = Tensor | CompressedWeight
"""One expert's slice of a parameter."""


class HeldExpert(HeldGroup):
    """One expert of a packed module, in its place. It comes when tokens are routed to it."""

    def __init__(
        self,
        payload: Payload,
        memory: FastMemory,
        archive: Archive,
        originals: Originals,
        packed: "PackedExperts",
    ) -> None:
        super().__init__(payload, memory, archive, originals)
        assert payload.group.expert is not None
        self.packed = packed
        self.number = payload.group.expert
        self._is_home = False
        self._slices = _ExpertWeights(self, originals, memory)
        self.weights = self._slices

    @property
    def is_routed(self) -> bool:
        """It comes when tokens are routed to it, into the cache of experts."""
        return not self.packed.is_plain

    @property
    def is_hooked(self) -> bool:
        """It comes at no module's hook unless all experts of its module are there as they are."""
        return self.packed.is_plain

    def acquire(self) -> int:
        """Bring nothing: what is below comes once it is routed to."""
        if not self.units:
            return super().acquire()
        self.refuse_written()
        return 0

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
        matrix = weight.expand(0, part.rows)
        return matrix.t() if part.transposed else matrix.view(part.shape)

    def view(self, buffer: Tensor) -> dict[str, ExpertWeight]:
        """Return its weights, by parameter, from the bytes of its payload in fast memory."""
        found: dict[str, ExpertWeight] = {}
        for part in self.payload.parts:
            if part.record is None:
                found[part.parameter] = part_view(buffer, part)
                continue
            assert self.memory.scratch is not None
            record = buffer[part.offset : part.offset + part.num_bytes]
            found[part.parameter] = EncodedWeight(
                record, part.record, dtype=part.dtype, scratch=self.memory.scratch
            )
        return found

    def restore(self) -> None:
        """Bring the original weights home for good."""
        if self._originals.from_checkpoint or self.packed.is_plain or self._is_home:
            return
        for part in self.payload.parts:
            name = part.parameter
            home = self._originals.home(name)
            self.packed.give_back(self.number, part, self.read_original(name), home)
        self.native, self.stored, self.tier = None, None, None
        self.units, self._is_home = (), True

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
