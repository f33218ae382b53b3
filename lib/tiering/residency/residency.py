"""Residency: puts each group of blocks where the plan says, and brings weights back for each use.

What moves is in ``payload``, how it moves in ``prefetch`` and ``link``, what parameters are
meanwhile in ``access``. Weights come back with the same values, dtype and strides; lossy precisions
keep the original in a store, for detach.
"""

import contextlib
import ctypes
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch

from ...blocks import storage_bytes
from ...codecs.kernels import Scratch
from ...errors import PlacementError
from ...policy.plan import Plan, Step
from ...vocabulary import Tier
from ..payload.groups import Group
from ..payload.layout import Payload, codec_scratch_bytes, lookup_bytes
from ..stores import aligned_buffer
from ..transfer.link import Link
from ..transfer.prefetch import Prefetcher
from .access import Access, Held
from .archive import Archive
from .casting import copy_bytes
from .originals import Originals
from .placing import Placing
from .reader import plain_tensors
from .stand_ins import set_weights

_KEPT_COPIES = 8 * 2**20


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
        self._freed_copies = 0
        """What was freed of autocast's copies and not given back to the system yet."""
        self.access = Access(originals, archive, link, device)
        """How the weights are got at."""
        self._placing = Placing(self.access, archive, originals)

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
                self._placing.let_go(held, payloads[name])
            elif held.tier is Tier.HBM and not _has_room(plan, held):
                self._placing.forget_stored(held)
        self._sweep()
        self._make_scratch(plan)
        for name in moves:
            held, tier = self._held[name], plan.placements[name].tier
            if tier is held.tier:
                continue
            before = held.stored
            if tier is not Tier.HBM:
                self._placing.send_off(held, tier)
            else:
                self._placing.bring_in(held, store=not plan.budget or plan.limit(Tier.SSD) is None)
                if not _has_room(plan, held):
                    self._placing.forget_stored(held)
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
        if not self._emulated and measured > plan.fast_bytes:
            raise PlacementError(
                f"weights take {measured} bytes of fast memory, and the plan {plan.fast_bytes}: "
                "please report this, with the model and the budget"
            )

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

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """Let groups move during a forward: what was held before is held afterwards."""
        holds = [(held, held.num_holds) for held in self._held.values() if held.num_holds]
        try:
            yield
        finally:
            for held, num_holds in holds:
                self.access.hold_again(held, num_holds)

    @property
    def left_bytes(self) -> int:
        """Former slots that others have kept views of."""
        return self._link.left_bytes()

    def held_at_once(self, groups: Iterable[str]) -> set[str]:
        """Return those of the groups that a module's hooks hold as a whole."""
        return {name for name in groups if not self._held[name].payload.by_rows}

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

    def copy_bytes(self, group: str, dtype: torch.dtype) -> int:
        """Return what copies of a group's weights take while its module computes in ``dtype``."""
        held = self._held[group]
        return copy_bytes(held.payload, [dtype], whole=not held.units)

    def give_back_copies(self, num_bytes: int) -> None:
        """Give freed copies back to the system from time to time: between small allocations malloc
        finds no place for the next one, and would take as much memory as all copies together.
        """
        self._freed_copies += num_bytes
        if self._freed_copies >= _KEPT_COPIES and self._device.type == "cpu":
            self._freed_copies = 0
            _trim_heap()

    @property
    def trains(self) -> bool:
        """Say whether weights were trainable when they were given."""
        return self._originals.trains

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self._device

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
                self._placing.forbid(held, error, all_parts=False)
        self._originals.restore(list(failures))
        if failures:
            name, reason = next(iter(failures.items()))
            raise PlacementError(
                f"{len(failures)} parameters could not be restored; free memory and detach again, "
                f"or reload the model: {name}: {reason}"
            )
        self._link.close()
        self._archive.close()

    def _sweep(self) -> None:
        """Free what nothing refers to any more."""
        kept = [held.stored for held in self._held.values() if held.stored is not None]
        kept += [held.native[0] for held in self._held.values() if held.native is not None]
        self._archive.keep_only(set(kept))

    def _make_scratch(self, plan: Plan) -> None:
        """Allocate working memory for compressed weights, and the buffer of embedding lookups."""
        num_bytes = codec_scratch_bytes(held.payload for held in self._held.values())
        if not num_bytes:
            self.access.scratch = None
        elif self.access.scratch is None:
            self.access.scratch = Scratch(num_bytes, self._device)
        else:
            self.access.scratch.resize(num_bytes)
        lookups = [
            lookup_bytes(held.payload)
            for name, held in self._held.items()
            if plan.placements[name].tier is not Tier.HBM
        ]
        size = max(lookups, default=0)
        if size != self.access.lookup.numel():
            self.access.lookup = torch.empty(0, dtype=torch.uint8)
            self.access.lookup = aligned_buffer(size) if size else self.access.lookup

    def _restore(self, held: Held) -> None:
        """Bring a group's original weights home for good."""
        if self._originals.from_checkpoint:
            return
        if held.tier is Tier.HBM and not held.payload.lossy:  # in memory: nothing is read
            held.native = None
            return
        if held.native is None:
            return
        stored, payload = held.native
        for part, weights in self._archive.weights(stored, payload, self._originals.home):
            set_weights(self.access.parameter(part), weights)
        held.native, held.stored, held.tier = None, None, None
        held.units = ()
        held.resident.clear()


def _has_room(plan: Plan, held: Held) -> bool:
    """Say whether the tier of a group's stored copy has room for more than the plan counts."""
    return held.stored is None or plan.limit(held.stored[0]) is None


def _trim_heap() -> None:
    """Give freed memory back to the system: under a memory limit what malloc keeps counts as
    ours.
    """
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
