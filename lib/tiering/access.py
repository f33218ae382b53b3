"""Access: what a group's parameters are while its weights are in use, and what stands for them
while they are away.

In use they are views of a slot, or their own weights; away they are zero-size stand-ins
(``offloaded``) that fetch what an operation needs. What is written to a stand-in has nowhere to go:
such writes show in its version counter, which aliases share, and the group is then refused.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass

from ..errors import PlacementError
from ..hints import Tier
from ..precision.kernels import CompressedWeight, EncodedWeight, Scratch
from .archive import Archive, Stored
from .link import Link, Unit
from .offloaded import OffloadedParameter, WeightOps, set_away, set_weights
from .originals import Originals
from .parts import Part
from .payload import Payload, raw_view
from .prefetch import Prefetcher
from .rowwise import StreamedRows


@dataclass(slots=True, eq=False)
class Held:
    """A group as it is held now."""

    payload: Payload
    tier: Tier | None = None
    """Where the plan has put it; None before the first plan."""
    units: tuple[Unit, ...] = ()
    """What moves of it; empty while it resides in fast memory."""
    num_holds: int = 0
    resident: dict[str, CompressedWeight] = field(default_factory=dict)
    """Compressed weights in fast memory, by parameter."""
    stored: Stored | None = None
    """Where its payload is, once it has been stored."""
    versions: list[int] = field(default_factory=list)
    """Of its parameters when they were last placed, to notice writes."""
    digest: str | None = None
    """Of a checkpoint's weights as they came into fast memory."""
    native: tuple[Stored, Payload] | None = None
    """Where the original weights are once they are nowhere in memory."""

    @property
    def by_rows(self) -> bool:
        """It moves in shards, at the request of operations and not of its module's hooks."""
        return bool(self.units) and self.payload.by_rows

    @property
    def writable(self) -> bool:
        """Its weights are in fast memory as they are: what is written to them stays."""
        return not self.units and not self.payload.lossy


OnMove = Callable[[str], contextlib.AbstractContextManager[Callable[[int], None]]]


class Access:
    """Gives groups their weights for as long as they are used. One thread at a time."""

    def __init__(
        self, originals: Originals, archive: Archive, link: Link, device: torch.device
    ) -> None:
        self.originals = originals
        self.archive = archive
        self.link = link
        self.device = device
        self.prefetcher = Prefetcher(link, 0, [])
        self.scratch: Scratch | None = None
        """Working memory for compressed weights."""
        self.lookup = torch.empty(0, dtype=torch.uint8)
        """The buffer of lookups in embeddings that are away."""
        self.on_extra: Callable[[int], None] = lambda num_bytes: None
        """Told of fast memory taken (or, negative, given back) beyond the plan's."""
        self.alone: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
        """Entered for as long as an operation outside a module's own hooks has weights: keeps other
        threads from slots and scratch.
        """
        self.on_move: OnMove = lambda group: contextlib.nullcontext(lambda num_bytes: None)
        """Entered around each transfer outside a module's own hooks; told the bytes that moved."""
        self.on_use: Callable[[str], None] = lambda group: None
        """Told of each full use that comes from an operation and not from a module's hooks."""

    def parameter(self, part: Part) -> nn.Parameter:
        """Return the model's own parameter."""
        return self.originals.parameters[part.parameter]

    def acquire(self, held: Held) -> int:
        """Bring a group's weights into fast memory; returns the bytes moved. Nests.

        Blocks until they are there. Raises PlacementError where the stored bytes are not sound, and
        where something was written to the weights while they were away.
        """
        if not held.units:
            self.link.use_in_place(held.payload.data_bytes)
        self.refuse_written(held)
        if not held.units or held.by_rows:
            return 0
        held.num_holds += 1  # first: whoever is interrupted below is found by end_holds
        if held.num_holds > 1:
            return 0
        unit = held.units[0]
        try:
            with plain_tensors():
                buffer = self.prefetcher.acquire(unit)
                self._show(held, self._in_memory(held, 0) if buffer is None else buffer)
        except Exception:
            held.num_holds -= 1
            raise
        return unit.data_bytes

    def release(self, held: Held) -> None:
        """End one use; nothing is copied back, since weights don't change."""
        if held.num_holds == 0:
            return
        held.num_holds -= 1
        if held.num_holds == 0:
            with plain_tensors():
                self.hide(held)
            self.prefetcher.release(held.units[0], shared=True)

    def hide(self, held: Held) -> None:
        """Take a group's weights from its parameters; weights by rows keep their operations."""
        for part in held.payload.parts:
            ops = None
            if held.by_rows:
                ops = StreamedRows(
                    _GroupReader(self, held),
                    held.payload.shards,
                    part.columns,
                    part.dtype,
                    self.scratch,
                )
            self._take_away(held, part, ops)

    def reside(self, held: Held, part: Part, weight: CompressedWeight) -> None:
        """Let a compressed weight in fast memory stand for a parameter."""
        held.resident[part.parameter] = weight
        self._take_away(held, part, weight)

    def was_written(self, held: Held) -> bool:
        """Say whether a parameter, or an alias of it, was written to since it was placed."""
        return self.versions(held) != held.versions

    def versions(self, held: Held) -> list[int]:
        """Return the version counters of a group's parameters."""
        with DisableTorchFunctionSubclass():
            return [self.parameter(part)._version for part in held.payload.parts]

    def refuse_written(self, held: Held) -> None:
        """Raise PlacementError where a write to weights that are away was lost."""
        if not held.writable and self.was_written(held):
            raise PlacementError(
                f"weights of {held.payload.group.name} were written to while they were away, and "
                "what was written is lost: detach, change the model, and attach again"
            )

    def _show(self, held: Held, buffer: Tensor) -> None:
        """Make a group's parameters views of its bytes in a slot."""
        for part in held.payload.parts:
            if part.record is None:
                set_weights(self.parameter(part), raw_view(buffer, part))
            else:
                assert self.scratch is not None
                record = buffer[part.offset : part.offset + part.num_bytes]
                weight = EncodedWeight(record, part.record, dtype=part.dtype, scratch=self.scratch)
                self._take_away(held, part, weight)

    def _take_away(self, held: Held, part: Part, ops: WeightOps | None) -> None:
        set_away(
            self.parameter(part),
            self.originals.shapes[part.parameter],
            lambda: self._whole(held, part),
            ops,
            placeholder=torch.empty(0, dtype=part.dtype, device=self.device),
            transposed=part.transposed,
        )

    @contextlib.contextmanager
    def _whole(self, held: Held, part: Part) -> Iterator[None]:
        """Make one parameter a plain one for an operation that can't do with less."""
        name, parameter = held.payload.group.name, self.parameter(part)
        self.refuse_written(held)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.alone())
            if held.units and not held.by_rows:
                moved = stack.enter_context(self.on_move(name))
                self.on_use(name)
                moved(self.acquire(held))
                stack.callback(self.release, held)
            if isinstance(parameter, OffloadedParameter):
                ops = parameter._tierhints_ops
                assert ops is not None
                with plain_tensors():
                    matrix = ops.expand(0, part.rows)
                    self.on_extra(matrix.untyped_storage().nbytes())
                    stack.callback(self.on_extra, -matrix.untyped_storage().nbytes())
                    weights = _in_shape(matrix, part)
                    if weights.data_ptr() != matrix.data_ptr():  # both are there for a moment
                        self.on_extra(weights.untyped_storage().nbytes())
                        self.on_extra(-weights.untyped_storage().nbytes())
                    del matrix
                    set_weights(parameter, weights)
                stack.callback(self._take_away, held, part, ops)
            yield

    def _in_memory(self, held: Held, index: int) -> Tensor:
        """Return a shard where it is kept in memory, as in emulation."""
        assert held.stored is not None
        view, shard = self.archive.view(held.stored), held.payload.shards[index]
        assert view is not None
        return view[shard.offset : shard.offset + shard.num_bytes]

    def _read_rows(self, held: Held, index: int, ids: Tensor) -> tuple[Tensor, int]:
        """Read rows of a shard into memory of their own; returns them and the bytes that moved."""
        shard, part = held.payload.shards[index], held.payload.parts[0]
        assert held.stored is not None
        if shard.record is None:
            rows, moved = self.archive.raw_rows(held.stored, part, shard, ids, self.lookup)
            return rows.to(self.device), moved
        assert self.scratch is not None
        record = self.archive.shard_record(held.stored, shard, self.lookup).to(self.device)
        weight = EncodedWeight(record, shard.record, dtype=part.dtype, scratch=self.scratch)
        return weight.rows(ids), shard.data_bytes


class _GroupReader:
    """Gets shards of one group through the prefetcher, and rows past it."""

    def __init__(self, access: Access, held: Held) -> None:
        self._access = access
        self._held = held

    @property
    def requires_grad(self) -> bool:
        """The parameter's flag: it decides how torch.matmul computes, also without gradients."""
        return self._access.parameter(self._held.payload.parts[0]).requires_grad

    @contextlib.contextmanager
    def hold(self, index: int) -> Iterator[Tensor]:
        """Bring a shard into fast memory for as long as the context lasts."""
        access, unit = self._access, self._held.units[index]
        access.refuse_written(self._held)
        with access.alone():
            if index == 0:
                access.on_use(unit.group)
            if unit.num_bytes > access.prefetcher.slot_bytes:
                with self._read_apart(index) as buffer:
                    yield buffer
                return
            with access.on_move(unit.group) as moved, plain_tensors():
                there = access.prefetcher.acquire(unit)
                moved(unit.data_bytes)
            try:
                yield access._in_memory(self._held, index) if there is None else there
            finally:
                access.prefetcher.release(unit, shared=False)

    @contextlib.contextmanager
    def _read_apart(self, index: int) -> Iterator[Tensor]:
        """Read a shard that the plan has no slot for, since it foresaw lookups only."""
        access, held = self._access, self._held
        unit = held.units[index]
        assert held.stored is not None
        with access.on_move(unit.group) as moved, plain_tensors():
            shard = held.payload.shards[index]
            buffer = access.archive.read_shard(held.stored, shard).to(access.device)
            access.link.fetch(unit.tier, unit.data_bytes)
            moved(unit.data_bytes)
        access.on_extra(unit.num_bytes)
        try:
            yield buffer
        finally:
            access.on_extra(-unit.num_bytes)

    def read_rows(self, index: int, ids: Tensor) -> Tensor:
        """Return rows (n, columns) of a shard, by their numbers within it."""
        access, unit = self._access, self._held.units[index]
        access.refuse_written(self._held)
        with access.on_move(unit.group) as moved, plain_tensors():
            rows, moved_bytes = access._read_rows(self._held, index, ids)
            access.link.fetch(unit.tier, moved_bytes)
            moved(moved_bytes)
        return rows


def _in_shape(matrix: Tensor, part: Part) -> Tensor:
    """Return a decoded matrix as the parameter was: its shape and strides."""
    if not part.transposed and part.is_contiguous:
        return matrix.view(part.shape)
    weights = torch.empty_strided(part.shape, part.stride, dtype=part.dtype, device=matrix.device)
    return weights.copy_(matrix.t() if part.transposed else matrix.view(part.shape))


@contextlib.contextmanager
def plain_tensors() -> Iterator[None]:
    """Make ordinary tensors: those made in inference mode could not be used outside it."""
    with torch.inference_mode(mode=False), torch.no_grad():
        yield
