"""A group of blocks as it is held: where a plan has put it, how it gets there, and its use.

Weights come back with the same values, dtype and strides. Originals of compressed weights are
stored before they leave memory, unless a checkpoint has them: detach gives them back, and another
precision is made from them.
"""

import contextlib
import weakref
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ...errors import PlacementError
from ...policy.plan import Plan
from ...vocabulary import Tier
from ..payload.layout import Payload, make_payload
from ..payload.parts import Part
from ..transfer.transport import Unit
from .archive import Archive, Stored
from .away import AwayWeights, look
from .casting import copy_bytes
from .fast_memory import FastMemory
from .originals import Originals
from .rowwise import StreamedRows
from .stand_ins import WeightOps, plain_tensors, set_weights
from .weights import GroupWeights


class HeldGroup:
    """One group, in its place. Used by one thread at a time."""

    def __init__(
        self, payload: Payload, memory: FastMemory, archive: Archive, originals: Originals
    ) -> None:
        self.payload = payload
        self.memory = memory
        self.archive = archive
        self._originals = originals
        self.name = payload.group.name
        self.weights = GroupWeights(payload, originals, memory, self.stand_in)
        """What the model's parameters have of it."""
        self.tier: Tier | None = None
        """Where the plan has put it; None before the first plan."""
        self.units: tuple[Unit, ...] = ()
        """What moves of it; empty while it resides in fast memory."""
        self.num_holds = 0
        self.stored: Stored | None = None
        """Where its payload is, once it has been stored."""
        self.native: tuple[Stored, Payload] | None = None
        """Where the original weights are once they are nowhere in memory."""
        self.copies: dict[str, weakref.ref[Tensor]] = {}
        """What was last given out, to be kept, of parameters that are away."""
        self._digest: str | None = None
        """Of a checkpoint's weights as they came into fast memory."""

    @property
    def by_rows(self) -> bool:
        """It moves in shards, at the request of operations and not of its module's hooks."""
        return bool(self.units) and self.payload.by_rows

    @property
    def is_routed(self) -> bool:
        """It comes when tokens are routed to it, into the cache of experts."""
        return False

    @property
    def is_hooked(self) -> bool:
        """It comes at its module's hook."""
        return True

    @property
    def _writable(self) -> bool:
        """Its weights are in fast memory as they are: what is written to them stays."""
        return not self.units and not self.payload.lossy

    # -- use ---------------------------------------------------------------------------------------

    def acquire(self) -> int:
        """Bring the weights into fast memory; returns the bytes moved. Nests.

        Blocks until they are there. Raises PlacementError where the stored bytes are not sound, and
        where something was written to the weights while they were away. A group by rows
        does nothing here: its operations fetch what they need.
        """
        if not self.units:
            self.memory.charges.use_in_place(self.payload.data_bytes)
        self.refuse_written()
        if self.units:
            self.memory.ensure_room(partial(look, [self], []))
        if not self.units or self.by_rows:
            return 0
        self.num_holds += 1  # first: after an interrupt below, end_holds finds it
        if self.num_holds > 1:
            return 0
        try:
            return self._fetch()
        except Exception:
            self.num_holds -= 1
            raise

    def release(self) -> None:
        """End one use; nothing is copied back, since weights don't change."""
        if self.num_holds > 1:
            self.num_holds -= 1
        elif self.num_holds:
            self.end_holds()
            self._give_back()

    def hold_again(self, num_holds: int) -> None:
        """Go on with holds after groups have moved during a forward."""
        if self.units and not self.by_rows:
            self.num_holds = num_holds
            self._fetch()

    def end_holds(self) -> None:
        """Give back what an interrupted forward still holds; the slots are the prefetcher's."""
        if self.num_holds:
            self._hide()  # first: an interrupt in it leaves a hold to end
            self.num_holds = 0

    def refuse_written(self) -> None:
        """Raise PlacementError where a write to weights that are away was lost."""
        if self.write_was_lost:
            raise PlacementError(
                f"weights of {self.name} were written to while they were away, and "
                "what was written is lost: detach, change the model, and attach again"
            )

    @property
    def write_was_lost(self) -> bool:
        """Something was written to weights while they were away."""
        return self.tier is not None and not self._writable and self.weights.written

    def copy_bytes(self, dtype: torch.dtype) -> int:
        """Return what autocast's copies of the weights take while their module computes."""
        return copy_bytes(self.payload, [dtype], whole=not self.units)

    def shard_in_memory(self, index: int) -> Tensor:
        """Return a shard where it is kept in memory, as in emulation."""
        assert self.stored is not None
        view, shard = self.archive.view(self.stored), self.payload.shards[index]
        assert view is not None
        return view[shard.offset : shard.offset + shard.num_bytes]

    def read_copy(self, part: Part, device: torch.device) -> Tensor:
        """Read a raw part from its tier into memory of its own."""
        assert self.stored is not None
        return self.archive.copy(self.stored, self.payload, part, device)

    def _fetch(self) -> int:
        with plain_tensors():
            buffer, moved_bytes = self._bring()
            self.weights.show(buffer)
        return moved_bytes

    @contextlib.contextmanager
    def pretending(self, blank: Tensor) -> Iterator[None]:
        """Let the parameters look as while they are there, with whatever is in ``blank``: nothing
        may compute with them.
        """
        with plain_tensors():
            if self.by_rows:
                (part,) = self.payload.parts
                shape = self._originals.shapes[part.parameter]
                none = torch.empty(1, dtype=part.dtype, device=blank.device).expand(shape.shape)
                set_weights(self.weights.parameter(part), none)
            else:
                self.weights.show_as_resident(blank)
        try:
            yield
        finally:
            self._hide()

    def _bring(self) -> tuple[Tensor, int]:
        """Wait for its bytes in fast memory; returns them, and how many have moved for it."""
        unit = self.units[0]
        buffer = self.memory.prefetcher.acquire(unit)
        return (self.shard_in_memory(0) if buffer is None else buffer), unit.data_bytes

    def _give_back(self) -> None:
        self.memory.prefetcher.release(self.units[0], shared=True)

    def _hide(self) -> None:
        with plain_tensors():
            self.weights.hide(StreamedRows(self) if self.by_rows else None)

    def stand_in(self, part: Part, ops: WeightOps | None) -> AwayWeights:
        """Make what stands behind a parameter that is away."""
        return AwayWeights(self, part, self._originals.shapes[part.parameter], ops)

    # -- placing: while nothing is in use ----------------------------------------------------------

    def send_off(self, tier: Tier) -> None:
        """Leave fast memory (or go to another tier below)."""
        if self.tier is Tier.HBM and not self.payload.lossy:
            self._forget_changed()
        self.stored = self.archive.put(self.payload, tier, self.stored)
        self._keep_native()
        self.units = tuple(
            Unit(
                self.name,
                index,
                tier,
                self.stored[1],
                shard.offset,
                shard.num_bytes,
                shard.data_bytes,
            )
            for index, shard in enumerate(self.payload.shards)
        )
        self.copies.clear()
        self.tier = tier
        self._hide()
        self.weights.note_versions()
        self._digest = None
        self._note_originals()

    def back_up(self, tier: Tier) -> None:
        """Store what is in fast memory in a tier below, too."""
        self.stored = self.archive.put(self.payload, tier)
        self._keep_native()

    def reads_originals(self, plan: Plan) -> bool:
        """Say whether a checkpoint's weights are read when it goes where the plan says."""
        tier = plan.placements[self.name].tier
        if tier is self.tier or self.stored is not None or not self._originals.from_checkpoint:
            return False
        if self.archive.is_kept(self.payload):
            return False
        if tier is not Tier.HBM:
            return not self.archive.has(self.payload, tier)
        return not (self._is_stored_by(plan) and self.archive.has(self.payload, Tier.SSD))

    def bring_in(self, plan: Plan) -> None:
        """Come into fast memory for good. What is made for it on the way is kept on the disk where
        it serves the next run, and the plan doesn't limit that.
        """
        payload = self.payload
        if self.stored is None and not payload.lossy:
            self.weights.take_over()
        elif self.stored is None and not self._is_stored_by(plan):
            self._keep_native()
            with contextlib.closing(
                self.archive.pieces(payload, self.weights.takes_over)
            ) as pieces:
                self.weights.make(pieces)
        else:
            if self.stored is None:
                self.stored = self.archive.put(payload, Tier.SSD)
                self._keep_native()
            self.weights.load(self.archive, self.stored)
        self.units = ()
        self.tier = Tier.HBM
        self.weights.note_versions()
        self._note_originals()
        if self._originals.from_checkpoint and not payload.lossy:
            self._digest = self.weights.contents()
        self.keep_stored(plan)

    def let_go(self, payload: Payload) -> None:
        """Drop what is held, which is then made from the originals as another payload.

        Nothing can compute with the parameters in between.
        """
        self.payload = self.weights.payload = payload
        if payload.lossy:
            self._keep_native()
        elif self.native is not None:
            self.native = self.native[0], payload
        self.stored = None if payload.lossy or self.native is None else self.native[0]
        self.units, self.tier = (), None
        self._note_originals()
        self.weights.forbid("they were let go of, and could not be made again")

    def keep_stored(self, plan: Plan) -> None:
        """Keep a copy of weights in fast memory only where the plan doesn't limit its tier."""
        if self.stored is not None and plan.limit(self.stored[0]) is not None:
            self.stored = None
            if not self.payload.lossy:
                self.native = None

    def restore(self) -> None:
        """Bring the original weights home for good."""
        if self._originals.from_checkpoint:
            return
        if self.tier is Tier.HBM and not self.payload.lossy:  # in memory: nothing is read
            self.native = None
            return
        if self.native is None:
            return
        stored, payload = self.native
        self.weights.give_back(self.archive.weights(stored, payload, self._originals.home))
        self.native, self.stored, self.tier = None, None, None
        self.units = ()

    def kept(self) -> set[Stored]:
        """Return what it refers to in stores."""
        native = set() if self.native is None else {self.native[0]}
        return native if self.stored is None else native | {self.stored}

    def _is_stored_by(self, plan: Plan) -> bool:
        """Say whether what is made for fast memory is kept on the disk as well."""
        unlimited = not plan.budget or plan.limit(Tier.SSD) is None
        return self.payload.lossy and unlimited and self.archive.lasting

    def _forget_changed(self) -> None:
        """Store weights anew that were written to while they were in fast memory.

        Writes through ``.data`` or numpy show in no version counter: contents are compared.
        """
        if self._originals.from_checkpoint:
            if self.weights.contents() != self._digest:
                raise PlacementError(
                    f"weights of {self.name} were changed and are a checkpoint's: "
                    "detach before changing the model"
                )
        elif self.stored is not None and self.archive.key(self.payload) != self.stored[1]:
            self.stored, self.native = None, None

    def _keep_native(self) -> None:
        """See to it that the original weights are stored before they leave memory."""
        if self._originals.from_checkpoint:
            return
        if not self.payload.lossy:
            assert self.stored is not None
            self.native = self.stored, self.payload
        elif self.native is None:
            shapes = self._originals.shapes
            native = make_payload(self.payload.group, self._originals.model, shapes, None)
            self.native = self.archive.put(native, Tier.SSD), native

    def _note_originals(self) -> None:
        """Say where the weights are read that have left the parameters for good."""
        for part in self.payload.parts:
            self._originals.stored.pop(part.parameter, None)
            if self.payload.lossy and self.native is not None:
                read = partial(self.archive.original, *self.native, part.parameter)
                self._originals.stored[part.parameter] = read
