"""The transitions that were carried out: by whom, from when to when, and how many bytes.

Two bounded logs: blocks that change their place for good, and units that stream through slots,
which come and go in every pass.
"""

import time
from collections import deque
from collections.abc import Iterator

from ...policy.states import Transition
from ...vocabulary import State

_RESIDENT = {State.FULL, State.REDUCED, State.COMPRESSED}
_KEPT = 10_000


class TransitionLog:
    """What has moved, the latest of each kind."""

    def __init__(self) -> None:
        self.states: dict[str, State] = {}
        """Where each group is for good."""
        self.slot_states: dict[str, State] = {}
        """As what each is used in a slot."""
        self._moves: deque[Transition] = deque(maxlen=_KEPT)
        self._streamed: deque[tuple[str, State, State, float, float, int]] = deque(maxlen=_KEPT)

    def __iter__(self) -> Iterator[Transition]:
        """Yield the transitions of blocks that change their place for good, oldest first."""
        return iter(self._moves)

    def streamed(self) -> list[Transition]:
        """Return those of units that come into slots and leave them, in the order of their ends."""
        return [
            Transition(
                block=block,
                before=before,
                after=after,
                reason="streamed",
                begin=begin,
                end=end,
                num_bytes=num_bytes,
            )
            for block, before, after, begin, end, num_bytes in self._streamed
        ]

    def move(self, block: str, after: State, reason: str, begin: float, num_bytes: int) -> None:
        """Note that a block has arrived for good; ``begin``: when it began to move."""
        before, end = self.states.get(block), time.perf_counter()
        self.states[block] = after
        if before is None or before is after:  # placed for the first time, or made anew there
            return
        if after in _RESIDENT:
            self._add(block, before, State.IN_FLIGHT, reason, begin, begin, 0)
            before = State.IN_FLIGHT
        self._add(block, before, after, reason, begin, end, num_bytes)

    def let_go(self, block: str, begin: float) -> None:
        """Note that what was held is gone, and the original on storage is what there is."""
        before = self.states.get(block)
        if before is not None and before is not State.COLD:
            reason = "let go of, to be made again from the original"
            self._add(block, before, State.COLD, reason, begin, time.perf_counter(), 0)
        self.states[block] = State.COLD

    def arrive(self, block: str, asked: float, ended: float, num_bytes: int) -> None:
        """Note that a unit has arrived in a slot, when it was asked for and when it was there."""
        below, after = self.states[block], self.slot_states[block]
        self._streamed.append((block, below, State.IN_FLIGHT, asked, asked, 0))
        self._streamed.append((block, State.IN_FLIGHT, after, asked, ended, num_bytes))

    def leave(self, block: str) -> None:
        """Note that a unit's slot was given to another: its bytes below are still there."""
        now = time.perf_counter()
        self._streamed.append((block, self.slot_states[block], self.states[block], now, now, 0))

    def _add(
        self,
        block: str,
        before: State,
        after: State,
        reason: str,
        begin: float,
        end: float,
        num_bytes: int,
    ) -> None:
        self._moves.append(
            Transition(
                block=block,
                before=before,
                after=after,
                reason=reason,
                begin=begin,
                end=end,
                num_bytes=num_bytes,
            )
        )
