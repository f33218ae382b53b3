"""What a scheduler decides, the figures it shows, and the account it keeps of each request."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from .ladder import SINK_TOKENS, Ladder


@dataclass(frozen=True, slots=True)
class Grant:
    """A waiting request may climb to ``tier``, or grow to ``room`` tokens."""

    id: int
    tier: int
    room: int


@dataclass(frozen=True, slots=True)
class Preemption:
    """A running request steps down to ``tier``; None: it is evicted, gives back all that it has,
    and will be admitted again, with the tokens it had made as part of its prompt.
    """

    id: int
    tier: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerState:
    """Figures to show."""

    budget_bytes: int
    """Without the slot."""
    used_bytes: int
    """At the lengths that texts have now."""
    held_bytes: int
    hard_reserve_bytes: int
    soft_reserve_bytes: int
    running: int
    """Those that wait in the line as well."""
    asking: int
    """Running, and waiting for a climb or for room."""
    waiting: int
    """For admission."""
    rates: Mapping[str, tuple[int, int]]
    """Class -> (requests that climbed, requests that are decided)."""


@dataclass(slots=True, kw_only=True)
class Account:
    """What a request has of memory, and may ask for."""

    id: int
    order: int
    """Of coming."""
    kind: str
    begun: int
    prompt: int
    cap: int
    """Tokens that it came with, those to begin with (more, if it was evicted), and with all new
    ones.
    """
    lowest: int
    tier: int
    top: int
    """Tiers: that it starts at, that it is at, that it may climb to."""
    drafts: bool
    """Whether its tokens are drafted below full: it may step down, then."""
    deadline: float | None
    decided: bool
    """Whether it counts as climbed, or as not climbed."""
    tokens: int = 0
    room: int = 0
    """The length that its text has, and that it may have without asking."""
    settled: int = 0
    """Tokens of its text of which pages have been made, where they are to be."""
    held: int = 0
    claim: int = 0
    """Bytes at its tier and room, and the most that it has to get to end."""

    @property
    def need(self) -> int:
        """Bytes that it still has to get, if it asks for them."""
        return self.claim - self.held

    @property
    def length(self) -> int:
        """Tokens of its text, the whole prompt from the beginning on."""
        return max(self.tokens, self.prompt)

    @property
    def new_tokens(self) -> int:
        """Tokens of its answer so far."""
        return self.length - self.begun

    @property
    def left(self) -> float:
        """Share of its new tokens that it may still make: its chance to climb falls with it."""
        return (self.cap - self.length) / max(1, self.cap - self.prompt)

    def is_late(self, now: float) -> bool:
        """Say whether its deadline has passed."""
        return self.deadline is not None and self.deadline <= now


@dataclass(frozen=True, slots=True)
class Sizes:
    """What requests take, and in which portions. ``window``: tokens that stand in full behind a
    text whose tokens are drafted; ``portion``: None gives a text room for all of its tokens.
    """

    ladder: Ladder
    window: int
    portion: int | None

    def grown(self, request: Account, tier: int, room: int) -> int:
        """Return the most bytes of a text until it has ``room`` tokens."""
        window = self._window(tier, request.drafts)
        return self.ladder.peak_bytes(tier, room, start=request.settled, window=window)

    def settle(self, request: Account, tokens: int) -> None:
        """Take back what a text held before its latest page was made: if there are more tokens now,
        those before have been settled.
        """
        if tokens > request.tokens:
            request.settled = request.tokens
            request.held = self.grown(request, request.tier, request.room)

    def in_portion(self, room: int, tier: int, *, drafts: bool) -> int:
        """Return the most bytes of a text while it grows to ``room`` from where the portion before
        ends.
        """
        assert self.portion is not None
        start, window = max(0, room - self.portion), self._window(tier, drafts)
        return self.ladder.peak_bytes(tier, room, start=start, window=window)

    def claimed(self, request: Account, tier: int) -> int:
        """Return the most bytes that it has to get to end, if it is at ``tier``: what drafts may
        stay there.
        """
        return self.whole(request, tier) if request.drafts else self.whole(request, request.top)

    def largest(self, request: Account) -> int:
        """Return the most bytes that it may ever hold."""
        tiers = {max(request.lowest, request.top - 1), request.top}
        return max(self.whole(request, tier) for tier in tiers)

    def climb(self, request: Account) -> int:
        """Return what its climb to the top would take more now."""
        return self.grown(request, request.top, request.room) - request.held

    def whole(self, request: Account, tier: int) -> int:
        """Return the most bytes that it may hold at a tier."""
        return self.grown(replace(request, settled=0), tier, request.cap)

    def room_for(self, request: Account, tokens: int) -> int:
        """Return the length that a text is given room for which is to have so many tokens."""
        if self.portion is None:
            return request.cap
        portions = -(-(tokens - SINK_TOKENS) // self.portion)
        return min(request.cap, SINK_TOKENS + portions * self.portion)

    def _window(self, tier: int, drafts: bool) -> int:
        return self.window if drafts and tier < self.ladder.full else 0
