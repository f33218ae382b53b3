"""Residency: puts each group of blocks where the plan says, and brings weights back for each use.

What moves is in ``payload``, how it moves in ``prefetch`` and ``link``, what parameters are
meanwhile in ``access``. Weights come back with the same values, dtype and strides; lossy precisions
keep the original in a store, for detach.
"""

import contextlib
import ctypes
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from ..blocks import storage_bytes
from ..errors import PlacementError
from ..hints import Tier
from ..policy.plan import Plan, Step
from ..precision.kernels import SCRATCH_BYTES, Scratch
from .access import Access, Held, plain_tensors
from .archive import Archive
from .link import Link, Unit
from .loading import encode, load, take_over
from .needs import lookup_bytes
from .offloaded import OffloadedParameter, set_away, set_weights
from .originals import Originals
from .parts import Part
from .payload import Group, Payload, make_payload
from .prefetch import Prefetcher
from .stores import aligned_buffer


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
        self._held = {name: Held(payload) for name, payload in payloads.items()}
        self._originals = originals
        self._link = link
        self._archive = archive
        self._device = device
        self._emulated = emulated
        self.access = Access(originals, archive, link, device)
        """How the weights are got at."""

    # -- placing -----------------------------------------------------------------------------------

    def apply(
        self,
        plan: Plan,
        payloads: Mapping[str, Payload],
        schedule: Sequence[Step],
        moves: Sequence[str],
        *,
        progress: Callable[[int], None] = lambda num_bytes: None,
    ) -> None:
        """Carry a plan out: slots go, blocks move one after the other, slots are made anew.

        ``payloads`` has the groups at the precisions of the plan; those held at another one are let
        go of first, and made from the originals. ``moves`` names what moves, in an order that the
        veto has found to keep the budgets; ``schedule`` has the uses in the order in which they are
        likely to come. May be called again while nothing is held.
        """
        self.end_holds()
        for held in self._held.values():
            if held.tier is not None:
                self.access.refuse_written(held)
        self._prefetcher.drain()
        self.access.prefetcher = Prefetcher(self._link, 0, [])  # what fails below leaves no slots
        self._link.make_slots(0, 0)
        for name, held in self._held.items():
            if payloads[name].precision is not held.payload.precision:
                self._let_go(held, payloads[name])
            elif held.tier is Tier.HBM and not _has_room(plan, held):
                self._forget_stored(held)
        self._sweep()
        self._make_scratch(plan)
        for name in moves:
            held, tier = self._held[name], plan.placements[name].tier
            if tier is held.tier:
                continue
            before = held.stored
            if tier is not Tier.HBM:
                self._send_off(held, tier)
            else:
                self._bring_in(held, store=not plan.budget or plan.limit(Tier.SSD) is None)
                if not _has_room(plan, held):
                    self._forget_stored(held)
            if before not in (None, held.stored):
                self._sweep()
            progress(held.payload.num_bytes)
        self._link.make_slots(plan.num_slots, plan.slot_bytes)
        units = [
            unit for step in schedule if not step.lookup for unit in self._held[step.block].units
        ]
        self.access.prefetcher = Prefetcher(
            self._link, plan.num_slots, units, slot_bytes=plan.slot_bytes
        )
        self._sweep()
        _trim_heap()
        measured = self.resident_bytes()
        assert self._emulated or measured <= plan.fast_bytes, (measured, plan.fast_bytes)

    @property
    def _prefetcher(self) -> Prefetcher:
        return self.access.prefetcher

    def lossy_parameters(self) -> set[int]:
        """Return the identities of the parameters whose weights are not those that were given."""
        return {
            id(self.access.parameter(part))
            for held in self._held.values()
            for part in held.payload.parts
            if part.codec is not None
        }

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

        Blocks until they are there. Raises PlacementError where the stored bytes are not sound, and
        where something was written to the weights while they were away. Groups by rows
        do nothing here: their operations fetch what they need.
        """
        return self.access.acquire(self._held[group])

    def release(self, group: str) -> None:
        """End one use; nothing is copied back, since weights don't change."""
        self.access.release(self._held[group])

    def requires_grad(self, group: str) -> bool:
        """Say whether somebody has asked for gradients of weights during a forward."""
        with torch._C.DisableTorchFunctionSubclass():
            return any(
                self.access.parameter(part).requires_grad
                for part in self._held[group].payload.parts
            )

    def end_holds(self) -> None:
        """Give back what an interrupted forward still holds."""
        for held in self._held.values():
            if held.num_holds:
                held.num_holds = 0
                with plain_tensors():
                    self.access.hide(held)
        self._prefetcher.end_holds()

    def begin_forward(self) -> None:
        """Say that the schedule starts from its beginning; parameters get the flags for it."""
        self._originals.match_grad_mode()
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
        num_bytes = storage_bytes([*there, *self._link.slots(), self.access.lookup])
        num_bytes += self.access.scratch.num_bytes if self.access.scratch is not None else 0
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
            if held.tier is not None and not held.writable and self.access.was_written(held):
                warnings.warn(
                    f"what was written to weights of {held.payload.group.name} while they were "
                    "away is lost: the model has the weights that it was given",
                    RuntimeWarning,
                    stacklevel=4,
                )
            try:
                self._restore(held)
            except (PlacementError, OSError, RuntimeError, MemoryError) as error:
                # RuntimeError: out of memory, as torch says it.
                failures |= dict.fromkeys((part.parameter for part in held.payload.parts), error)
                self._forbid(held, error, all_parts=False)
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
        if not lossy:
            self.access.scratch = None
        elif self.access.scratch is None:
            self.access.scratch = Scratch(SCRATCH_BYTES, self._device)
        lookups = [
            lookup_bytes(held.payload)
            for name, held in self._held.items()
            if plan.placements[name].tier is not Tier.HBM
        ]
        size = max(lookups, default=0)
        if size != self.access.lookup.numel():
            self.access.lookup = torch.empty(0, dtype=torch.uint8)
            self.access.lookup = aligned_buffer(size) if size else self.access.lookup

    # -- moves between tiers -----------------------------------------------------------------------

    def _send_off(self, held: Held, tier: Tier) -> None:
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
        self.access.hide(held)
        held.versions, held.digest = self.access.versions(held), None
        self._note_originals(held)

    def _bring_in(self, held: Held, *, store: bool) -> None:
        """Put a group into fast memory for good. ``store``: what is made for it on the way may be
        kept on the disk, for the next run.
        """
        payload = held.payload
        if held.stored is None and not payload.lossy:
            take_over(self.access, held)
        elif held.stored is None and not store:
            self._keep_native(held)
            encode(self.access, held)
        else:
            if held.stored is None:
                held.stored = self._archive.put(payload, Tier.SSD)
                self._keep_native(held)
            load(self.access, held, held.stored)
        held.units = ()
        held.tier = Tier.HBM
        held.versions = self.access.versions(held)
        self._note_originals(held)
        if self._originals.from_checkpoint and not payload.lossy:
            held.digest = self._contents(held)

    def _let_go(self, held: Held, payload: Payload) -> None:
        """Drop what is held of a group, which is then made from the originals as another payload.

        Nothing can compute with its parameters in between.
        """
        held.payload = payload
        if payload.lossy:
            self._keep_native(held)
        elif held.native is not None:
            held.native = held.native[0], payload
        held.stored = None if payload.lossy or held.native is None else held.native[0]
        held.units, held.tier = (), None
        self._note_originals(held)
        self._forbid(held, "they were let go of, and could not be made again")

    def _forget_stored(self, held: Held) -> None:
        """Keep no copy of a group that is in fast memory."""
        held.stored = None
        if not held.payload.lossy:
            held.native = None

    def _sweep(self) -> None:
        """Free what nothing refers to any more."""
        kept = [held.stored for held in self._held.values() if held.stored is not None]
        kept += [held.native[0] for held in self._held.values() if held.native is not None]
        self._archive.keep_only(set(kept))

    def _contents(self, held: Held) -> str:
        """Return a key for what a group's parameters have in memory now."""
        names = [part.parameter for part in held.payload.parts]
        return "".join(self._originals.contents(name) for name in names)

    def _forget_changed(self, held: Held) -> None:
        """Store weights anew that were written to while they were in fast memory.

        Writes through ``.data`` or numpy show in no version counter: contents are compared.
        """
        if self._originals.from_checkpoint:
            if self._contents(held) != held.digest:
                raise PlacementError(
                    f"weights of {held.payload.group.name} were changed and are a checkpoint's: "
                    "detach before changing the model"
                )
        elif held.stored is not None and self._archive.key(held.payload) != held.stored[1]:
            held.stored, held.native = None, None

    def _keep_native(self, held: Held) -> None:
        """See to it that the original weights are stored before they leave memory."""
        if self._originals.from_checkpoint:
            return
        payload = held.payload
        if not payload.lossy:
            assert held.stored is not None
            held.native = held.stored, payload
        elif held.native is None:
            shapes = self._originals.shapes
            native = make_payload(payload.group, self._originals.model, shapes, None)
            held.native = self._archive.put(native, Tier.SSD), native

    def _note_originals(self, held: Held) -> None:
        """Say where the weights of a group are read that have left its parameters for good."""
        for part in held.payload.parts:
            self._originals.stored.pop(part.parameter, None)
            if held.payload.lossy and held.native is not None:
                read = partial(self._archive.original, *held.native, part.parameter)
                self._originals.stored[part.parameter] = read

    def _forbid(self, held: Held, reason: object, *, all_parts: bool = True) -> None:
        """Let nothing compute with what stands for weights that are not there; not ``all_parts``:
        leave those that are.
        """

        def refuse() -> contextlib.AbstractContextManager[None]:
            raise PlacementError(
                f"weights of {held.payload.group.name} could not be restored ({reason}): free "
                "memory and detach the runtime again, or reload the model"
            )

        held.resident.clear()
        for part in held.payload.parts:
            parameter = self.access.parameter(part)
            if all_parts or isinstance(parameter, OffloadedParameter):
                shape = self._originals.shapes[part.parameter]
                set_away(parameter, shape, refuse, placeholder=_placeholder(part))

    def _restore(self, held: Held) -> None:
        """Bring a group's original weights home for good."""
        if held.native is None:
            return
        stored, payload = held.native
        if held.tier is Tier.HBM and payload is held.payload:  # they are in memory: nothing is read
            for part in payload.parts:
                parameter = self.access.parameter(part)
                set_weights(
                    parameter, parameter.data.to(self._originals.home(part.parameter), copy=True)
                )
            held.native = None
            return
        for part, weights in self._archive.weights(stored, payload, self._originals.home):
            set_weights(self.access.parameter(part), weights)
        held.native, held.stored, held.tier = None, None, None
        held.units = ()
        held.resident.clear()


def _has_room(plan: Plan, held: Held) -> bool:
    """Say whether the tier of a group's stored copy has room for more than the plan counts."""
    return held.stored is None or plan.limit(held.stored[0]) is None


def _placeholder(part: Part) -> torch.Tensor:
    return torch.empty(0, dtype=part.dtype)


def _trim_heap() -> None:
    """Give freed memory back to the system: under a memory limit what malloc keeps counts as
    ours.
    """
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
