"""The weights of one group as the model's parameters have them: plain, compressed, or away.

Plain they are memory of their own or views of a slot. Compressed, or away, zero-size stand-ins
(``stand_ins``) compute or fetch what an operation needs. What is written to a stand-in has nowhere
to go: such writes show in its version counter, which aliases share.
"""

import contextlib
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass

from ...codecs.kernels import CompressedWeight, EncodedWeight, empty_weight, prepare, takes_over
from ...errors import PlacementError
from ..payload.contents import Piece, part_view
from ..payload.layout import Payload
from ..payload.parts import Part
from .archive import Archive, Stored
from .fast_memory import FastMemory
from .originals import Originals
from .stand_ins import Away, OffloadedParameter, WeightOps, set_away, set_weights

MakeAway = Callable[[Part, WeightOps | None], Away]
"""Makes what stands behind a parameter, from the operations that can do without its weights."""


class GroupWeights:
    """The parameters of one group. ``make_away`` is the group's part in their stand-ins."""

    def __init__(
        self, payload: Payload, originals: Originals, memory: FastMemory, make_away: MakeAway
    ) -> None:
        self.payload = payload
        self._originals = originals
        self._memory = memory
        self._make_away = make_away
        self.compressed: dict[str, CompressedWeight] = {}
        """Those that reside in fast memory, by parameter."""
        self.shown: Tensor | None = None
        """The bytes that the parameters have for as long as they are in a slot."""
        self._versions: list[int] = []

    def parameter(self, part: Part) -> nn.Parameter:
        """Return the model's own parameter."""
        return self._originals.parameters[part.parameter]

    def is_away(self, part: Part) -> bool:
        """Say whether a stand-in is in a parameter's place."""
        return isinstance(self.parameter(part), OffloadedParameter)

    def ops(self, part: Part) -> WeightOps:
        """Return what computes with the weights that a stand-in is for."""
        parameter = self.parameter(part)
        assert isinstance(parameter, OffloadedParameter)
        ops = parameter._tierhints_away.ops
        assert ops is not None
        return ops

    def give_back(self, weights: Iterable[tuple[Part, Tensor]]) -> None:
        """Let the parameters be plain ones with the weights that were given."""
        for part, given in weights:
            set_weights(self.parameter(part), given)
        self.compressed.clear()

    @property
    def compressed_bytes(self) -> int:
        """Bytes of compressed weights in fast memory."""
        return sum(weight.num_bytes for weight in self.compressed.values())

    @property
    def requires_grad(self) -> bool:
        """Somebody has asked for gradients of the weights."""
        with DisableTorchFunctionSubclass():
            return any(self.parameter(part).requires_grad for part in self.payload.parts)

    @property
    def lossy(self) -> set[int]:
        """The identities of the parameters whose weights are not those that were given."""
        return {id(self.parameter(part)) for part in self.payload.parts if part.codec is not None}

    def note_versions(self) -> None:
        """Remember what was written so far; later writes to weights that are away are lost."""
        self._versions = self._read_versions()

    @property
    def written(self) -> bool:
        """A parameter, or an alias of it, was written to since ``note_versions``."""
        return self._read_versions() != self._versions

    def contents(self) -> str:
        """Return a key for what the parameters have in memory now."""
        names = [part.parameter for part in self.payload.parts]
        return "".join(self._originals.contents(name) for name in names)

    # -- in fast memory ----------------------------------------------------------------------------

    def take_over(self) -> None:
        """Let the weights that were given be what the parameters hold in fast memory."""
        device = self._memory.device
        for part in self.payload.parts:
            # In RAM a copy even on the same device: weights loaded from safetensors are slices of
            # one mapped file, which stays in memory for as long as any of them is used.
            copy = device.type == "cpu" and not self._originals.from_checkpoint
            weights = self._originals.read(part.parameter).to(device, copy=copy)
            set_weights(self.parameter(part), weights)

    def load(self, archive: Archive, stored: Stored) -> None:
        """Read a stored payload into weights of their own."""
        payload, device = self.payload, self._memory.device
        if not payload.lossy:
            for part in payload.parts:
                set_weights(self.parameter(part), archive.copy(stored, payload, part, device))
        elif payload.by_rows:
            weight = self._allocate(payload.parts[0])
            for buffer, shard in archive.shards(stored, payload):
                assert shard.record is not None
                weight.fill(shard.start, buffer[: shard.data_bytes], shard.record)
            self._reside(payload.parts[0], weight)
        else:
            for part, source in archive.weights(stored, payload, lambda name: device):
                if part.record is None:
                    set_weights(self.parameter(part), source)
                else:
                    self._reside(part, self._prepare(part, source))

    def takes_over(self, part: Part) -> bool:
        """Say whether ``make`` computes with a part's record itself."""
        return part.record is not None and takes_over(part.record, part.uses, self._memory.device)

    def make(self, pieces: Iterable[Piece]) -> None:
        """Make compressed weights from what goes into their payload."""
        copy = not self._originals.from_checkpoint  # not a part of larger memory
        made: dict[str, CompressedWeight] = {}
        plain: list[tuple[Part, Tensor]] = []
        for part, start, data, record in pieces:
            if record is None:
                plain.append((part, data.to(self._memory.device, copy=copy)))
                continue
            if record == part.record:
                made[part.parameter] = self._prepare(part, data)
                continue
            if part.parameter not in made:
                made[part.parameter] = self._allocate(part)
            made[part.parameter].fill(start, data, record)
        for part, data in plain:
            self._set(part, data)
        for part in self.payload.parts:
            if part.parameter in made:
                self._reside(part, made[part.parameter])

    def show(self, buffer: Tensor) -> None:
        """Make the parameters views of their bytes in a slot, or compute with their records."""
        self.shown = buffer
        for part in self.payload.parts:
            if part.record is None:
                set_weights(self.parameter(part), part_view(buffer, part))
            else:
                scratch = self._memory.scratch
                assert scratch is not None
                record = buffer[part.offset : part.offset + part.num_bytes]
                weight = EncodedWeight(record, part.record, dtype=part.dtype, scratch=scratch)
                self.take_away(part, weight)

    def show_as_resident(self, buffer: Tensor) -> None:
        """Do so, and let modules find compressed weights as those that reside."""
        self.show(buffer)
        for part in self.payload.parts:
            if part.record is not None:
                weight = self.ops(part)
                assert isinstance(weight, EncodedWeight)
                self.compressed[part.parameter] = weight

    # -- away --------------------------------------------------------------------------------------

    def hide(self, ops: WeightOps | None = None) -> None:
        """Take the weights from the parameters; ``ops`` compute what they can meanwhile."""
        self.compressed.clear()
        self.shown = None
        for part in self.payload.parts:
            self.take_away(part, ops)

    def take_away(self, part: Part, ops: WeightOps | None) -> None:
        """Take one parameter's weights from it."""
        placeholder = torch.empty(0, dtype=part.dtype, device=self._memory.device)
        set_away(self.parameter(part), self._make_away(part, ops), placeholder=placeholder)

    def forbid(self, reason: object, *, all_parts: bool = True) -> None:
        """Let nothing compute with what stands for weights that are not there; not ``all_parts``:
        leave those that are.
        """
        self.compressed.clear()
        for part in self.payload.parts:
            if all_parts or self.is_away(part):
                shape = self._originals.shapes[part.parameter]
                placeholder = torch.empty(0, dtype=part.dtype)
                away = Lost(shape, self.payload.group.name, reason)
                set_away(self.parameter(part), away, placeholder=placeholder)

    def _read_versions(self) -> list[int]:
        with DisableTorchFunctionSubclass():
            return [self.parameter(part)._version for part in self.payload.parts]

    def _set(self, part: Part, weights: Tensor) -> None:
        set_weights(self.parameter(part), weights)

    def _reside(self, part: Part, weight: CompressedWeight) -> None:
        self.compressed[part.parameter] = weight
        self.take_away(part, weight)

    def _prepare(self, part: Part, record: Tensor) -> CompressedWeight:
        scratch = self._memory.scratch
        assert part.record is not None and scratch is not None
        return prepare(
            record,
            part.record,
            dtype=part.dtype,
            device=self._memory.device,
            uses=part.uses,
            scratch=scratch,
        )

    def _allocate(self, part: Part) -> CompressedWeight:
        scratch = self._memory.scratch
        assert part.record is not None and scratch is not None
        return empty_weight(
            part.record,
            dtype=part.dtype,
            device=self._memory.device,
            uses=part.uses,
            scratch=scratch,
        )


class Lost:
    """Stands for weights that are nowhere."""

    ops: WeightOps | None = None
    transposed = False

    def __init__(self, shape: Tensor, group: str, reason: object) -> None:
        self.shape = shape
        self._message = (
            f"weights of {group} could not be restored ({reason}): free memory "
            "and detach the runtime again, or reload the model"
        )

    def prepare(self, whole: Sequence[Away], by_rows: Sequence[Away]) -> bool:
        """There is nothing to make room for."""
        return False

    def fetch(self) -> contextlib.AbstractContextManager[None]:
        """Raise PlacementError."""
        raise PlacementError(self._message)

    def copy(self) -> None:
        """Raise PlacementError, by fetching."""
        return None
