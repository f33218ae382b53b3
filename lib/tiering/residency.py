"""Residency: puts each group of blocks where the plan says, and brings weights back for each use.

What moves is in ``payload``, how it moves in ``prefetch`` and ``link``, what stands in for a
parameter whose weights are away in ``offloaded``. Weights come back with the same values, dtype and
strides; lossy precisions keep the original in a store, for detach.
"""

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..blocks import storage_bytes
from ..errors import PlacementError
from ..hints import Tier
from ..policy.plan import Plan, Step
from ..precision.kernels import SCRATCH_BYTES, CompressedWeight, EncodedWeight, Scratch, allocate
from .archive import Archive, Stored
from .link import Link, Unit
from .needs import lookup_bytes
from .offloaded import OffloadedParameter, WeightOps, set_away, set_weights
from .originals import Originals
from .payload import Group, Part, Payload, make_payload, raw_view
from .prefetch import Prefetcher
from .rowwise import StreamedRows
from .stores import aligned_buffer


@dataclass(slots=True, eq=False)
class _Held:
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
    """Of its parameters while it resides raw in fast memory, to notice writes."""
    native: tuple[Stored, Payload] | None = None
    """Where the original weights are once they are nowhere in memory."""

    @property
    def by_rows(self) -> bool:
        """It moves in shards, at the request of operations and not of its module's hooks."""
        return bool(self.units) and self.payload.by_rows


OnMove = Callable[[str], contextlib.AbstractContextManager[Callable[[int], None]]]


class Residency:
    """The weights of one model under a plan. Used by one thread at a time (the runtime's lock).

    ``parameters`` are the model's own, by canonical name. On a machine without an accelerator HBM
    is RAM. With an emulated link all weights are kept in memory, and only the time is another.
    """

    def __init__(
        self,
        payloads: Mapping[str, Payload],
        originals: Originals,
        link: Link,
        archive: Archive,
        *,
        device: torch.device,
        emulated: bool,
    ) -> None:
        self._held = {name: _Held(payload) for name, payload in payloads.items()}
        self._originals = originals
        self._link = link
        self._archive = archive
        self._device = device
        self._emulated = emulated
        self._prefetcher = Prefetcher(link, 0, [])
        self._scratch: Scratch | None = None
        self._lookup = torch.empty(0, dtype=torch.uint8)
        self.on_extra: Callable[[int], None] = lambda num_bytes: None
        """Told of fast memory taken (or, negative, given back) beyond the plan's."""
        self.on_move: OnMove = lambda group: contextlib.nullcontext(lambda num_bytes: None)
        """Entered around each transfer outside a module's own hooks; told the bytes that moved."""

    # -- placing -----------------------------------------------------------------------------------

    def apply(
        self,
        plan: Plan,
        schedule: Sequence[Step],
        *,
        progress: Callable[[int], None] = lambda num_bytes: None,
    ) -> None:
        """Carry a plan out: first what leaves fast memory, then the slots, then what comes in.

        ``schedule`` has the uses in the order in which they are likely to come. May be called
        again with another plan of the same precisions, while nothing is held.
        """
        self.end_holds()
        self._prefetcher.drain()
        self._prefetcher = Prefetcher(self._link, 0, [])  # what fails below leaves no slots
        self._make_scratch(plan)
        for name, held in self._held.items():
            tier = plan.placements[name].tier
            if tier is not Tier.HBM and tier is not held.tier:
                self._send_off(held, tier)
                progress(held.payload.num_bytes)
        self._link.make_slots(plan.num_slots, plan.slot_bytes)
        for name, held in self._held.items():
            if plan.placements[name].tier is Tier.HBM and held.tier is not Tier.HBM:
                self._bring_in(held)
                progress(held.payload.num_bytes)
        units = [
            unit for step in schedule if not step.lookup for unit in self._held[step.block].units
        ]
        self._prefetcher = Prefetcher(self._link, plan.num_slots, units, slot_bytes=plan.slot_bytes)
        kept = [held.stored for held in self._held.values() if held.stored is not None]
        kept += [held.native[0] for held in self._held.values() if held.native is not None]
        self._archive.keep_only(set(kept))
        _trim_heap()
        measured = self.resident_bytes()
        assert self._emulated or measured <= plan.fast_bytes, (measured, plan.fast_bytes)

    @property
    def groups(self) -> list[Group]:
        """What is placed."""
        return [held.payload.group for held in self._held.values()]

    def first_block(self, group: str) -> str:
        """Return the block under which a group's transfers are booked."""
        return self._held[group].payload.group.blocks[0].name

    @property
    def virtual_seconds(self) -> float:
        """What an emulated link has let pass on its virtual clock since the last reset."""
        return self._link.virtual_seconds

    def wait_error(self) -> dict[str, float] | None:
        """Say how well emulated waits were met."""
        return self._link.wait_error()

    def reset(self) -> None:
        """Start the statistics anew."""
        self._link.reset()

    # -- use ---------------------------------------------------------------------------------------

    def acquire(self, group: str) -> int:
        """Bring a group's weights into fast memory; returns the bytes moved. Nests.

        Blocks until they are there. Raises PlacementError where the stored bytes are not sound.
        Groups by rows do nothing here: their operations fetch what they need.
        """
        held = self._held[group]
        if not held.units:
            self._link.use_in_place(held.payload.data_bytes)
        if not held.units or held.by_rows:
            return 0
        held.num_holds += 1  # first: whoever is interrupted below is found by end_holds
        if held.num_holds > 1:
            return 0
        unit = held.units[0]
        try:
            with _plain_tensors():
                buffer = self._prefetcher.acquire(unit)
                self._show(held, self._in_memory(held, 0) if buffer is None else buffer)
        except Exception:
            held.num_holds -= 1
            raise
        return unit.data_bytes

    def release(self, group: str) -> None:
        """End one use; nothing is copied back, since weights don't change."""
        held = self._held[group]
        if held.num_holds == 0:
            return
        held.num_holds -= 1
        if held.num_holds == 0:
            with _plain_tensors():
                self._hide(held)
            self._prefetcher.release(held.units[0], shared=True)

    def end_holds(self) -> None:
        """Give back what an interrupted forward still holds."""
        for held in self._held.values():
            if held.num_holds:
                held.num_holds = 0
                with _plain_tensors():
                    self._hide(held)
        self._prefetcher.end_holds()

    def begin_forward(self) -> None:
        """Say that the schedule starts from its beginning."""
        self._prefetcher.begin_forward()

    def end_forward(self) -> None:
        """Say that the schedule has come to its end."""
        self._prefetcher.end_forward()

    # -- figures -----------------------------------------------------------------------------------

    def resident_bytes(self) -> int:
        """Measure the weight bytes in fast memory: parameters, compressed weights, slots, scratch.

        In emulation also what stands for the other tiers, since all is in memory then.
        """
        with torch._C.DisableTorchFunctionSubclass():
            there = [
                parameter.data
                for parameter in self._originals.parameters.values()
                if parameter.device == self._device
            ]
        num_bytes = storage_bytes([*there, *self._link.slots(), self._lookup])
        num_bytes += self._scratch.num_bytes if self._scratch is not None else 0
        num_bytes += sum(
            weight.num_bytes for held in self._held.values() for weight in held.resident.values()
        )
        if self._emulated:
            num_bytes += self._archive.memory_bytes()
        return num_bytes

    def bytes_per_tier(self) -> dict[Tier, int]:
        """Add up the payload bytes of the groups by the tier in which they are."""
        totals: dict[Tier, int] = {}
        for held in self._held.values():
            assert held.tier is not None
            totals[held.tier] = totals.get(held.tier, 0) + held.payload.data_bytes
        return totals

    # -- the end -----------------------------------------------------------------------------------

    def close(self) -> None:
        """Bring everything back to where it was; raises PlacementError naming what could not be.

        It may then be called again, with more memory free: what is stored stays stored.
        """
        failures: dict[str, BaseException] = {}
        self.end_holds()
        self._prefetcher.drain()
        for held in self._held.values():
            try:
                self._restore(held)
            except (PlacementError, OSError, RuntimeError, MemoryError) as error:
                # RuntimeError: out of memory, as torch says it.
                failures |= dict.fromkeys((part.parameter for part in held.payload.parts), error)
        self._originals.restore(list(failures))
        if failures:
            name, reason = next(iter(failures.items()))
            raise PlacementError(
                f"{len(failures)} parameters could not be restored; free memory and detach again, "
                f"or reload the model: {name}: {reason}"
            )
        self._link.close()
        self._archive.close()

    def _make_scratch(self, plan: Plan) -> None:
        """Allocate working memory for compressed weights, and the buffer of embedding lookups."""
        lossy = any(held.payload.lossy for held in self._held.values())
        if lossy and self._scratch is None:
            self._scratch = Scratch(SCRATCH_BYTES, self._device)
        lookups = [
            lookup_bytes(held.payload)
            for name, held in self._held.items()
            if plan.placements[name].tier is not Tier.HBM
        ]
        if max(lookups, default=0) > self._lookup.numel():
            self._lookup = aligned_buffer(max(lookups))

    # -- moves between tiers -----------------------------------------------------------------------

    def _send_off(self, held: _Held, tier: Tier) -> None:
        """Take a group out of fast memory (or move it to another tier below)."""
        if held.tier is Tier.HBM and not held.payload.lossy:
            self._forget_changed(held)
        held.stored = self._archive.put(held.payload, tier, held.stored)
        self._keep_native(held)
        held.units = tuple(
            Unit(
                held.payload.group.name,
                index,
                tier,
                held.stored[1],
                shard.offset,
                shard.num_bytes,
                shard.data_bytes,
            )
            for index, shard in enumerate(held.payload.shards)
        )
        held.resident.clear()
        held.tier = tier
        self._hide(held)

    def _bring_in(self, held: _Held) -> None:
        """Put a group into fast memory for good."""
        payload = held.payload
        if held.tier is None and not payload.lossy:
            for part in payload.parts:
                # In RAM a copy even on the same device: weights loaded from safetensors are slices
                # of one mapped file, which stays in memory for as long as any of them is used.
                copy = self._device.type == "cpu" and not self._originals.from_checkpoint
                weights = self._originals.read(part.parameter).to(self._device, copy=copy)
                set_weights(self._parameter(part), weights)
        else:
            if held.stored is None:
                held.stored = self._archive.put(payload, Tier.SSD)
                self._keep_native(held)
            self._load(held, held.stored)
        held.units = ()
        held.tier = Tier.HBM
        held.versions = self._versions(held)

    def _versions(self, held: _Held) -> list[int]:
        if held.payload.lossy:  # asking a stand-in for anything expands its weights
            return []
        return [self._parameter(part)._version for part in held.payload.parts]

    def _forget_changed(self, held: _Held) -> None:
        """Store weights anew that were written to while they were in fast memory."""
        if self._versions(held) == held.versions:
            return
        if self._originals.from_checkpoint:
            raise PlacementError(
                f"weights of {held.payload.group.name} were changed and are a checkpoint's: detach "
                "before changing the model"
            )
        held.stored, held.native = None, None

    def _keep_native(self, held: _Held) -> None:
        """See to it that the original weights are stored before they leave memory."""
        if held.native is not None or self._originals.from_checkpoint:
            return
        payload = held.payload
        if payload.lossy:
            shapes = self._originals.shapes
            native = make_payload(payload.group, self._originals.model, shapes, None)
            held.native = self._archive.put(native, Tier.SSD), native
        else:
            assert held.stored is not None
            held.native = held.stored, payload

    def _load(self, held: _Held, stored: Stored) -> None:
        """Read a stored payload into weights of their own in fast memory."""
        payload = held.payload
        if payload.by_rows and payload.lossy:
            part = payload.parts[0]
            weight = self._allocate(part)
            for buffer, shard in self._archive.shards(stored, payload):
                assert shard.record is not None
                weight.fill(shard.start, buffer[: shard.data_bytes], shard.record)
            self._reside(held, part, weight)
            return
        if self._device.type == "cpu" and payload.in_place:
            # The buffer that was read into becomes the weights: no second copy, even for a moment.
            for buffer, _ in self._archive.shards(stored, payload):
                for part in payload.parts:
                    set_weights(self._parameter(part), raw_view(buffer, part))
            return
        for part, source in self._archive.weights(stored, payload, lambda name: self._device):
            if part.record is None:
                set_weights(self._parameter(part), source)
            else:
                weight = self._allocate(part)
                weight.fill(0, source, part.record)
                self._reside(held, part, weight)

    def _restore(self, held: _Held) -> None:
        """Bring a group's original weights home for good."""
        if held.native is None:
            return
        stored, payload = held.native
        if held.tier is Tier.HBM and payload is held.payload:  # they are in memory: nothing is read
            for part in payload.parts:
                parameter = self._parameter(part)
                set_weights(
                    parameter, parameter.data.to(self._originals.home(part.parameter), copy=True)
                )
            held.native = None
            return
        for part, weights in self._archive.weights(stored, payload, self._originals.home):
            set_weights(self._parameter(part), weights)
        held.native, held.stored, held.tier = None, None, None
        held.units = ()
        held.resident.clear()

    # -- parameters --------------------------------------------------------------------------------

    def _show(self, held: _Held, buffer: Tensor) -> None:
        """Make a group's parameters views of its bytes in a slot."""
        for part in held.payload.parts:
            if part.record is None:
                set_weights(self._parameter(part), raw_view(buffer, part))
            else:
                assert self._scratch is not None
                record = buffer[part.offset : part.offset + part.num_bytes]
                weight = EncodedWeight(record, part.record, dtype=part.dtype, scratch=self._scratch)
                self._take_away(held, part, weight)

    def _hide(self, held: _Held) -> None:
        """Take a group's weights from its parameters; weights by rows keep their operations."""
        for part in held.payload.parts:
            ops = None
            if held.by_rows:
                reader = _GroupReader(self, held)
                shards = held.payload.shards
                ops = StreamedRows(reader, shards, part.columns, part.dtype, self._scratch)
            self._take_away(held, part, ops)

    def _take_away(self, held: _Held, part: Part, ops: WeightOps | None) -> None:
        set_away(
            self._parameter(part),
            self._originals.shapes[part.parameter],
            lambda: self._whole(held, part),
            ops,
            placeholder=torch.empty(0, dtype=part.dtype, device=self._device),
            transposed=part.transposed,
        )

    @contextlib.contextmanager
    def _whole(self, held: _Held, part: Part) -> Iterator[None]:
        """Make one parameter a plain one for an operation that can't do with less."""
        name, parameter = held.payload.group.name, self._parameter(part)
        with contextlib.ExitStack() as stack:
            if held.units and not held.by_rows:
                moved = stack.enter_context(self.on_move(name))
                moved(self.acquire(name))
                stack.callback(self.release, name)
            if isinstance(parameter, OffloadedParameter):
                ops = parameter._tierhints_ops
                assert ops is not None
                with _plain_tensors():
                    matrix = ops.expand(0, part.rows)
                    weights = _in_shape(matrix, part)
                    self.on_extra(weights.untyped_storage().nbytes())
                    set_weights(parameter, weights)
                stack.callback(self._take_away, held, part, ops)
                stack.callback(self.on_extra, -weights.untyped_storage().nbytes())
            yield

    def _parameter(self, part: Part) -> nn.Parameter:
        return self._originals.parameters[part.parameter]

    def _allocate(self, part: Part) -> CompressedWeight:
        assert part.record is not None and self._scratch is not None
        return allocate(
            part.record,
            dtype=part.dtype,
            device=self._device,
            uses=part.uses,
            scratch=self._scratch,
        )

    def _in_memory(self, held: _Held, index: int) -> Tensor:
        """Return a shard where it is kept in memory, as in emulation."""
        assert held.stored is not None
        view, shard = self._archive.view(held.stored), held.payload.shards[index]
        assert view is not None
        return view[shard.offset : shard.offset + shard.num_bytes]

    def _reside(self, held: _Held, part: Part, weight: CompressedWeight) -> None:
        held.resident[part.parameter] = weight
        self._take_away(held, part, weight)

    def _read_rows(self, held: _Held, index: int, ids: Tensor) -> tuple[Tensor, int]:
        """Read rows of a shard into memory of their own; returns them and the bytes that moved."""
        shard, part = held.payload.shards[index], held.payload.parts[0]
        assert held.stored is not None
        if shard.record is None:
            rows, moved = self._archive.raw_rows(held.stored, part, shard, ids, self._lookup)
            return rows.to(self._device), moved
        assert self._scratch is not None
        record = self._archive.shard_record(held.stored, shard, self._lookup).to(self._device)
        weight = EncodedWeight(record, shard.record, dtype=part.dtype, scratch=self._scratch)
        return weight.rows(ids), shard.data_bytes


class _GroupReader:
    """Gets shards of one group through the prefetcher, and rows past it."""

    def __init__(self, residency: Residency, held: _Held) -> None:
        self._residency = residency
        self._held = held

    @contextlib.contextmanager
    def hold(self, index: int) -> Iterator[Tensor]:
        """Bring a shard into fast memory for as long as the context lasts."""
        residency, unit = self._residency, self._held.units[index]
        if unit.num_bytes > residency._prefetcher.slot_bytes:
            with self._read_apart(index) as buffer:
                yield buffer
            return
        with residency.on_move(unit.group) as moved, _plain_tensors():
            there = residency._prefetcher.acquire(unit)
            moved(unit.data_bytes)
        try:
            yield residency._in_memory(self._held, index) if there is None else there
        finally:
            residency._prefetcher.release(unit, shared=False)

    @contextlib.contextmanager
    def _read_apart(self, index: int) -> Iterator[Tensor]:
        """Read a shard that the plan has no slot for, since it foresaw lookups only."""
        residency, held = self._residency, self._held
        unit = held.units[index]
        assert held.stored is not None
        with residency.on_move(unit.group) as moved, _plain_tensors():
            shard = held.payload.shards[index]
            buffer = residency._archive.read_shard(held.stored, shard).to(residency._device)
            residency._link.fetch(unit.tier, unit.data_bytes)
            moved(unit.data_bytes)
        residency.on_extra(unit.num_bytes)
        try:
            yield buffer
        finally:
            residency.on_extra(-unit.num_bytes)

    def read_rows(self, index: int, ids: Tensor) -> Tensor:
        """Return rows (n, columns) of a shard, by their numbers within it."""
        residency, unit = self._residency, self._held.units[index]
        with residency.on_move(unit.group) as moved, _plain_tensors():
            rows, moved_bytes = residency._read_rows(self._held, index, ids)
            residency._link.fetch(unit.tier, moved_bytes)
            moved(moved_bytes)
        return rows


def _in_shape(matrix: Tensor, part: Part) -> Tensor:
    """Return a decoded matrix as the parameter was: its shape and strides."""
    weights = torch.empty_strided(part.shape, part.stride, dtype=part.dtype, device=matrix.device)
    return weights.copy_(matrix.t() if part.transposed else matrix.view(part.shape))


@contextlib.contextmanager
def _plain_tensors() -> Iterator[None]:
    """Make ordinary tensors: those made in inference mode could not be used outside it."""
    with torch.inference_mode(mode=False), torch.no_grad():
        yield


def _trim_heap() -> None:
    """Give freed memory back to the system: under a memory limit what malloc keeps counts as
    ours.
    """
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
