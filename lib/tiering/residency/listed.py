"""Experts that are modules of a list: each a group by itself, which its layer calls for the tokens
that are routed to it.

Where a plan has them below they come into the cache of experts (``experts``) one after another, as
the layer asks for them: what else it will ask for isn't known, so nothing is read ahead. Old layers
call every expert, also without tokens: those compute with a shape alone.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...blocks import routed_experts
from ...errors import PlacementError
from ..payload.layout import Payload
from .archive import Archive
from .fast_memory import FastMemory
from .held import HeldGroup
from .originals import Originals
from .stand_ins import plain_tensors, set_weights

if TYPE_CHECKING:
    from .experts import ExpertSlots

_MOST_TOKENS = 64
"""A prompt's are counted as no more than so many."""


class ListedExperts:
    """The experts of one list, the ``layer``-th with experts. Used by one thread at a time."""

    def __init__(
        self, name: str, originals: Originals, memory: FastMemory, slots: "ExpertSlots", layer: int
    ) -> None:
        self.name = name
        self.experts: list[ListedExpert] = []
        self._originals = originals
        self._memory = memory
        self._slots = slots
        self._layer = layer
        self._tokens: int | None = None
        """Of the layer's present call; None: it isn't running."""
        self._asked: set[int] = set()
        """The experts that it has asked for."""

    def add(self, payload: Payload, archive: Archive) -> "ListedExpert":
        """Return the group of the next expert."""
        expert = ListedExpert(payload, self._memory, archive, self._originals, self)
        self.experts.append(expert)
        return expert

    @property
    def routed(self) -> int:
        """How many experts a token takes."""
        return routed_experts(self._originals.model, self.name, len(self.experts))

    @property
    def is_below(self) -> bool:
        """Experts are below."""
        return any(expert.units for expert in self.experts)

    @property
    def is_busy(self) -> bool:
        """Some expert is being used."""
        return self._slots.is_busy

    def begin_call(self, tokens: int) -> None:
        """Hear that the layer begins with so many tokens: the experts that it asks for until its
        end are one step's.
        """
        self._tokens = tokens
        self._asked.clear()

    def end_call(self) -> None:
        """Hear that the layer has ended."""
        self._tokens = None
        self._asked.clear()

    def take(self, number: int, rows: int) -> tuple[Tensor, int]:
        """Wait for an expert that is called with so many tokens; returns its bytes in fast memory,
        and how many have moved for it. They stay until ``let_go``.
        """
        routing = _spread(number, rows, max(self._tokens or 0, rows))
        again, goes_on = number in self._asked, bool(self._asked)
        if self._tokens is not None:
            self._asked.add(number)
        return self._slots.take(self._layer, number, routing, again=again, goes_on=goes_on)

    def let_go(self, number: int) -> None:
        """Say that what was computed with an expert has been asked of the device."""
        self._slots.let_go(self._layer, number)


class ListedExpert(HeldGroup):
    """One expert of a list, in its place."""

    def __init__(
        self,
        payload: Payload,
        memory: FastMemory,
        archive: Archive,
        originals: Originals,
        listed: ListedExperts,
    ) -> None:
        super().__init__(payload, memory, archive, originals)
        assert payload.group.expert is not None
        self.listed = listed
        self.number = payload.group.expert
        self.rows = 1
        """The tokens of its next call."""
        self._is_blank = False

    @property
    def is_routed(self) -> bool:
        """It comes when tokens are routed to it."""
        return True

    def show_blank(self) -> None:
        """Let it compute without tokens, by the shapes of its weights; else they give NaN."""
        self._is_blank = True
        with plain_tensors():
            for part in self.payload.parts:
                fill = math.nan if part.dtype.is_floating_point else 0
                one = torch.full((), fill, dtype=part.dtype, device=self.memory.device)
                set_weights(self.weights.parameter(part), one.expand(part.shape))

    def hide_blank(self) -> None:
        """Take away again what ``show_blank`` has shown."""
        if self._is_blank:
            self._hide()
            self._is_blank = False

    def end_holds(self) -> None:
        """Give back what an interrupted forward still holds."""
        self.hide_blank()
        super().end_holds()

    def _bring(self) -> tuple[Tensor, int]:
        if self.listed.is_busy:
            raise PlacementError(
                f"weights of {self.name} are needed beside those of another expert of its list, "
                "which are below and come one at a time: give a budget that holds all experts, or "
                "detach the runtime first"
            )
        return self.listed.take(self.number, self.rows)

    def _give_back(self) -> None:
        self.listed.let_go(self.number)


def _spread(number: int, rows: int, tokens: int) -> list[tuple[int, ...]]:
    """Return the routing of a call's tokens as far as it shows in one expert: which of them chose
    it isn't known, and they are taken to be evenly apart.
    """
    length = min(tokens, _MOST_TOKENS)
    rows = max(rows * length // tokens, 1)
    return [
        (number,) if (place + 1) * rows // length > place * rows // length else ()
        for place in range(length)
    ]
