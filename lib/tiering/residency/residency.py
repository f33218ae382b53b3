"""Residency: all groups of a model in the places of a plan.

``HeldGroup`` moves and serves one of them, ``FastMemory`` has the slots that they stream through.
"""

import contextlib
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn

from ...blocks import storage_bytes
from ...errors import PlacementError
from ...policy.plan import Plan, Step
from ...vocabulary import State, Tier
from ..payload.layout import Payload
from .archive import Archive
from .experts import ExpertSlots
from .fast_memory import FastMemory, trim_heap
from .held import HeldGroup
from .listed import ListedExperts
from .originals import Originals
from .packed import PackedExperts, settle


class Residency:
    """The weights of one model under a plan. Used by one thread at a time (the runtime's lock).

    On a machine without an accelerator HBM is RAM. ``emulated``: all weights are kept in memory,
    and only the time is another.
    """

    def __init__(
        self,
        payloads: Mapping[str, Payload],
        memory: FastMemory,
        archive: Archive,
        originals: Originals,
        *,
        emulated: bool,
        router_counts: Mapping[str, float],
    ) -> None:
        self.layers: list[PackedExperts | ListedExperts] = []
        """The modules and the lists whose experts are groups by themselves."""
        self.experts = ExpertSlots(memory, self.layers, router_counts, emulated=emulated)
        """Those of these experts that are below, in fast memory for a while."""
        self.groups = {
            name: self._make_group(payload, memory, archive, originals)
            for name, payload in payloads.items()
        }
        self.memory = memory
        self._archive = archive
        self._originals = originals
        self.emulated = emulated
        self.moving: list[HeldGroup] = []
        """The groups that move under the present plan, packed experts apart; the others reside in
        fast memory.
        """
        self._compressed: list[nn.Parameter] = []
        """The parameters of groups that reside in fast memory compressed."""
        self._versions: list[int] = []

    # -- placing -----------------------------------------------------------------------------------

    def apply(
        self,
        plan: Plan,
        payloads: Mapping[str, Payload],
        schedule: Sequence[Step],
        moves: Sequence[str],
        *,
        progress: Callable[[int], object] = lambda num_bytes: None,
    ) -> None:
        """Carry a plan out: slots go, blocks move one after the other, slots are made anew.

        ``payloads`` has the groups at the precisions of the plan; those held at another one are let
        go of first, and made from the originals. ``moves`` names what moves, in an order that the
        veto has found to keep the budgets; ``schedule`` has the uses in the order in which they are
        likely to come. May be called again while nothing is held. Raises PlacementError where more
        than the plan's fast memory is taken in the end.
        """
        self.end_holds()
        self._archive.finish()
        for group in self.groups.values():
            group.refuse_written()
        self.memory.free_slots()  # what fails below leaves none
        self.experts.begin(plan, payloads)
        for packed in self.packed:
            packed.begin(plan, payloads)
        log = self.memory.transitions
        for name, group in self.groups.items():
            if payloads[name].precision is not group.payload.precision:
                began = time.perf_counter()
                group.let_go(payloads[name])
                log.let_go(name, began)
            elif group.tier is Tier.HBM:
                group.keep_stored(plan)
        self._sweep()
        self.memory.make_working_memory(
            [group.payload for group in self.groups.values()],
            away=[
                group.payload
                for name, group in self.groups.items()
                if plan.placements[name].tier is not Tier.HBM
            ],
        )
        expected = [
            part.parameter
            for name in moves
            if self.groups[name].reads_originals(plan)
            for part in payloads[name].parts
        ]
        with self._archive.reading_ahead(expected):
            for name in moves:
                group, tier = self.groups[name], plan.placements[name].tier
                if tier is group.tier:
                    continue
                before, began = group.stored, time.perf_counter()
                if tier is Tier.HBM:
                    group.bring_in(plan)
                else:
                    group.send_off(tier)
                if before not in (None, group.stored):
                    self._sweep()
                place, size = plan.placements[name], group.payload.num_bytes
                copied = size if tier is Tier.HBM or before != group.stored else 0
                log.move(name, place.state, place.reason, began, copied)
                log.slot_states[name] = State.COMPRESSED if group.payload.lossy else State.FULL
                progress(size)
        settle(self.packed)
        streamed = {name: group for name, group in self.groups.items() if not group.is_routed}
        steps = [step.block for step in schedule if not step.lookup and step.block in streamed]
        self.memory.adopt(plan, [unit for name in steps for unit in streamed[name].units])
        self.experts.adopt(plan)
        self._sweep()
        self.moving = [group for group in self.groups.values() if group.is_hooked and group.units]
        self._compressed = [
            group.weights.parameter(part)
            for group in self.groups.values()
            if group.payload.lossy and not group.units
            for part in group.payload.parts
        ]
        self._versions = self._read_versions()
        if self._compressed:
            self._match_grad_mode()  # parts that are called by themselves begin no forward
        trim_heap()
        measured = self.resident_bytes()
        if not self.emulated and measured > plan.fast_bytes:
            raise PlacementError(
                f"weights take {measured} bytes of fast memory, and the plan {plan.fast_bytes}: "
                "please report this, with the model and the budget"
            )

    def back_up(self, tier: Tier) -> None:
        """Store in a tier what is in fast memory and may leave it, so that nothing has to be copied
        when it does. It is kept for as long as the plan doesn't limit that tier.
        """
        for group in self.groups.values():
            if group.tier is Tier.HBM and group.stored is None and not group.payload.written:
                group.back_up(tier)

    # -- use ---------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """Let groups move during a forward: what was held before is held afterwards."""
        holds = [(group, group.num_holds) for group in self.groups.values() if group.num_holds]
        try:
            yield
        finally:
            for group, num_holds in holds:
                group.hold_again(num_holds)

    @property
    def moves(self) -> bool:
        """Weights come and go under the present plan, or experts are computed one by one."""
        apart = any(not packed.is_plain for packed in self.packed)
        return bool(self.moving) or apart

    @property
    def packed(self) -> list[PackedExperts]:
        """The modules with packed experts that are groups by themselves."""
        return [layer for layer in self.layers if isinstance(layer, PackedExperts)]

    @property
    def listed(self) -> list[ListedExperts]:
        """The lists of experts that are groups by themselves."""
        return [layer for layer in self.layers if isinstance(layer, ListedExperts)]

    def held_at_once(self, groups: Iterable[str]) -> set[str]:
        """Return those of the groups that a module's hooks hold as a whole, in slots of a plan."""
        held = (self.groups[name] for name in groups)
        return {each.name for each in held if not (each.payload.by_rows or each.is_routed)}

    @property
    def trains(self) -> bool:
        """Weights were trainable when they were given."""
        return self._originals.trains

    def lossy_parameters(self) -> set[int]:
        """Return the identities of the parameters whose weights are not those that were given."""
        return {name for group in self.groups.values() for name in group.weights.lossy}

    def end_holds(self) -> None:
        """Give back what an interrupted forward still holds."""
        for group in self.moving:
            group.end_holds()
        self.memory.prefetcher.end_holds()
        self.experts.mend()

    def begin_forward(self) -> None:
        """Say that the schedule starts from its beginning; parameters get the flags for it.

        Raises PlacementError where something was written to compressed weights, which have no
        hooks that would notice it.
        """
        if self._read_versions() != self._versions:
            for group in self.groups.values():
                group.refuse_written()
        self._match_grad_mode()
        self.memory.prefetcher.begin_forward()

    # -- figures -----------------------------------------------------------------------------------

    def resident_bytes(self) -> int:
        """Measure the weight bytes in fast memory: parameters, compressed weights, slots, scratch.

        In emulation also what stands for the other tiers, since all is in memory then.
        """
        memory = self.memory
        with torch._C.DisableTorchFunctionSubclass():
            there = [
                parameter.data
                for parameter in self._originals.parameters.values()
                if parameter.device == memory.device
            ]
        slots = self.experts.transport.slots()
        num_bytes = storage_bytes([*there, *memory.buffers(), *slots])
        num_bytes += sum(packed.resident_bytes() for packed in self.packed)
        num_bytes += memory.scratch.num_bytes if memory.scratch is not None else 0
        num_bytes += sum(group.weights.compressed_bytes for group in self.groups.values())
        if self.emulated:
            num_bytes += self._archive.memory_bytes()
        return num_bytes

    def states(self) -> dict[str, State]:
        """Return the state of each block now, and that of each tied copy; from any thread."""
        log, prefetcher = self.memory.transitions, self.memory.prefetcher
        in_flight = prefetcher.in_flight | self.experts.in_flight
        in_slots = prefetcher.in_slots | self.experts.in_slots
        states: dict[str, State] = {}
        for name, group in self.groups.items():
            state = log.states[name]
            if name in in_flight:
                state = State.IN_FLIGHT
            elif name in in_slots:
                state = log.slot_states[name]
            for block in group.payload.group.blocks:
                states[block.name] = state
                states |= dict.fromkeys(block.tied, State.RECOMPUTABLE)
        return states

    def bytes_per_tier(self) -> dict[Tier, int]:
        """Add up the payload bytes of the groups by the tier in which they are."""
        totals: dict[Tier, int] = {}
        for group in self.groups.values():
            assert group.tier is not None
            totals[group.tier] = totals.get(group.tier, 0) + group.payload.data_bytes
        return totals

    # -- the end -----------------------------------------------------------------------------------

    def close(self) -> None:
        """Bring everything back to where it was; raises PlacementError naming what could not be.

        It may then be called again, with more memory free: what is stored stays stored.
        """
        failures: dict[str, BaseException] = {}
        self.end_holds()
        self.memory.prefetcher.drain()
        self.experts.free()
        for group in self.groups.values():
            if group.write_was_lost:
                warnings.warn(
                    f"what was written to weights of {group.name} while they were "
                    "away is lost: the model has the weights that it was given",
                    RuntimeWarning,
                    stacklevel=4,
                )
            try:
                group.restore()
            except (PlacementError, OSError, RuntimeError, MemoryError) as error:
                # RuntimeError: out of memory, as torch says it.
                failures |= {part.parameter: error for part in group.payload.parts}
                group.weights.forbid(error, all_parts=False)
        self._originals.restore(list(failures))
        if failures:
            name, reason = next(iter(failures.items()))
            raise PlacementError(
                f"{len(failures)} parameters could not be restored; free memory and detach again, "
                f"or reload the model: {name}: {reason}"
            )
        self._close_stores()

    def free(self) -> None:
        """Let all weights go, those in fast memory and those that are stored."""
        self.end_holds()
        self.memory.prefetcher.drain()
        self.experts.free()
        for packed in self.packed:
            packed.forbid("its runtime has discarded them")
        for group in self.groups.values():
            group.weights.forbid("its runtime has discarded them")
        self._close_stores()

    def _make_group(
        self, payload: Payload, memory: FastMemory, archive: Archive, originals: Originals
    ) -> HeldGroup:
        if payload.group.expert is None:
            return HeldGroup(payload, memory, archive, originals)
        name = payload.group.experts
        if not self.layers or self.layers[-1].name != name:  # experts of a layer follow each other
            if payload.group.slice is None:
                number = len(self.layers)
                self.layers.append(ListedExperts(name, originals, memory, self.experts, number))
            else:
                self.layers.append(PackedExperts(name, originals, memory))
        return self.layers[-1].add(payload, archive)

    def _close_stores(self) -> None:
        for packed in self.packed:
            packed.leave()
        self.experts.transport.close()
        self.memory.transport.close()
        self._archive.close()

    def _match_grad_mode(self) -> None:
        self._originals.match_grad_mode(compressed=bool(self._compressed))

    def _read_versions(self) -> list[int]:
        with torch._C.DisableTorchFunctionSubclass():
            return [parameter._version for parameter in self._compressed]

    def _sweep(self) -> None:
        """Free what nothing refers to any more."""
        self._archive.keep_only({kept for group in self.groups.values() for kept in group.kept()})
