"""Placing: how one group gets from where it is held to where a plan has it, and what is kept of it.

Originals of compressed weights are stored before they leave memory, unless a checkpoint has them:
detach gives them back, and another precision is made from them.
"""

import contextlib
from functools import partial

import torch

from ...errors import PlacementError
from ...vocabulary import Tier
from ..payload.layout import Payload, make_payload
from ..payload.parts import Part
from ..transfer.link import Unit
from .access import Access, Held
from .archive import Archive
from .loading import encode, load, take_over
from .originals import Originals
from .stand_ins import OffloadedParameter, set_away


class Placing:
    """Moves the groups of one model, one at a time, while nothing is in use."""

    def __init__(self, access: Access, archive: Archive, originals: Originals) -> None:
        self._access = access
        self._archive = archive
        self._originals = originals

    def send_off(self, held: Held, tier: Tier) -> None:
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
        held.copies.clear()
        held.tier = tier
        self._access.hide(held)
        held.versions, held.digest = self._access.versions(held), None
        self._note_originals(held)

    def bring_in(self, held: Held, *, store: bool) -> None:
        """Put a group into fast memory for good. ``store``: what is made for it on the way may be
        kept on the disk, for the next run.
        """
        payload = held.payload
        if held.stored is None and not payload.lossy:
            take_over(self._access, held)
        elif held.stored is None and not store:
            self._keep_native(held)
            encode(self._access, held)
        else:
            if held.stored is None:
                held.stored = self._archive.put(payload, Tier.SSD)
                self._keep_native(held)
            load(self._access, held, held.stored)
        held.units = ()
        held.tier = Tier.HBM
        held.versions = self._access.versions(held)
        self._note_originals(held)
        if self._originals.from_checkpoint and not payload.lossy:
            held.digest = self._contents(held)

    def let_go(self, held: Held, payload: Payload) -> None:
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
        self.forbid(held, "they were let go of, and could not be made again")

    def forget_stored(self, held: Held) -> None:
        """Keep no copy of a group that is in fast memory."""
        held.stored = None
        if not held.payload.lossy:
            held.native = None

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

    def forbid(self, held: Held, reason: object, *, all_parts: bool = True) -> None:
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
            parameter = self._access.parameter(part)
            if all_parts or isinstance(parameter, OffloadedParameter):
                shape = self._originals.shapes[part.parameter]
                set_away(parameter, shape, refuse, placeholder=_placeholder(part))


def _placeholder(part: Part) -> torch.Tensor:
    return torch.empty(0, dtype=part.dtype)
