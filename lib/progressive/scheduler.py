"""Who runs, at which tier, and who waits, so that memory is never short. Pure: no torch, no clock.

A running request *holds* the most bytes that its text takes at its tier while it grows to its room
(``Ladder.peak_bytes``), and may *need* what more it would hold at its top tier and its cap, the
prompt with all tokens that it may make. One that drafts may end at any tier: it needs what it would
hold at its cap and the tier it has. With B the budget less the slot that all share, and free = B -
sum of held:

    invariant   some order exists in which each running request gets all it needs, finishes, and
                gives back all it holds (``is_safe``); so sum of held <= B
    admission   free afterwards >= the largest need of all that then run (the *hard reserve*: one
                full escalation at its length's cap), and >= what climbs will probably take (the
                *soft reserve*, a quantile); and B >= what all will probably have grown to (the
                *projected peak*, ``outlook.py``). The latter two shorten waits, and no promise
                rests on them
    the line    what can't be given at once waits, its state kept, first come first served, before
                any admission: its first gets what it asks for if the invariant then holds; one
                behind it, only if with what is free it could finish
    drafts      whoever drafts never waits for a climb: it gets it at once, or goes on drafting

Why the invariant holds: at admission every need fits into what is free. The first of the line is
checked. One behind it, whose whole need is free, may come first in the order, and gives all back.
Finishing, settling, stepping down and evicting give back what they held, or need less: whatever
order there was remains one.

Why nothing blocks: of those running, the first in the order needs no more than what is free. If it
waits it is given what it asks for, as first of the line or behind it; if not, it runs. So something
always runs, each request ends, and since nothing is admitted while any waits, those waiting get
their turn. Requests are admitted in the order they came: none is passed by. Stepping down is done
for the sake of older requests only.

Room is given as a whole at admission (``growth_tokens`` None), and no step ever waits; or in
portions, for answers that are mostly much shorter than they may be: more requests run, and one may
wait for its next portion. The caller does at once what is decided, what gives memory back first.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain

from ..errors import InputError
from .bounds import RequestError
from .decisions import Account, Grant, Preemption, SchedulerState, Sizes
from .ladder import Ladder
from .outlook import Outlook
from .reserve import is_safe


class Scheduler:
    """Decides for the requests of one model; for one thread.

    ``slot_bytes``: what all requests share, one layer in full of the longest and what is being
    encoded, taken off the budget. ``window``: tokens that may stand in full behind a text whose
    tokens are drafted below full, and checked later. ``growth_tokens``: of a portion of room; it
    ends where blocks of so many do. ``soft_quantile``: the lower, the more run, and the more climbs
    wait. ``history``: class -> (climbed, seen) of earlier requests; of an unknown class all are
    taken to climb. Raises InputError for a budget that the slot leaves nothing of.
    """

    def __init__(
        self,
        ladder: Ladder,
        budget_bytes: int,
        *,
        slot_bytes: int = 0,
        window: int = 0,
        growth_tokens: int | None = None,
        soft_quantile: float = 0.95,
        history: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        if budget_bytes <= slot_bytes:
            raise InputError(
                f"a budget of {budget_bytes} bytes for keys and values has no room beside the "
                f"{slot_bytes} that all requests share: give more"
            )
        self.ladder = ladder
        self._budget = budget_bytes - slot_bytes
        self._slot = slot_bytes
        self._sizes = Sizes(ladder, window=window, portion=growth_tokens)
        self._outlook = Outlook(self._sizes, quantile=soft_quantile, history=history)
        self._submitted = 0
        self._waiting: list[Account] = []
        self._running: dict[int, Account] = {}
        self._line: dict[int, Grant] = {}

    # -- requests come and go ----------------------------------------------------------------------

    def submit(
        self,
        id: int,
        prompt_tokens: int,
        max_new_tokens: int,
        *,
        tier: int,
        top_tier: int,
        deadline: float | None = None,
        kind: str = "",
        drafts: bool = False,
    ) -> None:
        """Put a request at the end of those waiting for admission.

        ``tier``: it starts at; ``top_tier``: the highest that it may ask for. ``kind``: its class,
        whose rate of climbs is counted. ``drafts``: below full its tokens are drafted, and
        checked later (a verified one's): right at any tier, so that it may be told to step down.
        Raises RequestError if at its cap it would never fit.
        """
        assert prompt_tokens > 0 <= max_new_tokens and 0 <= tier <= top_tier <= self.ladder.full
        assert id not in self._running and all(each.id != id for each in self._waiting)
        request = Account(
            id=id,
            order=self._submitted,
            kind=kind,
            begun=prompt_tokens,
            prompt=prompt_tokens,
            cap=prompt_tokens + max_new_tokens,
            lowest=tier,
            tier=tier,
            top=top_tier,
            drafts=drafts,
            deadline=deadline,
            decided=tier == top_tier,
        )
        request.claim = self._sizes.claimed(request, tier)
        if (largest := self._sizes.largest(request)) > self._budget:
            raise RequestError(
                f"{prompt_tokens} tokens and {max_new_tokens} new ones take {largest} bytes "
                f"of keys and values at tier {self.ladder.names[top_tier]}, and the budget is "
                f"{self._budget}: give a shorter prompt or fewer new tokens",
                param="max_tokens",
                code="kv_budget_exceeded",
            )
        self._submitted += 1
        self._waiting.append(request)

    def admit(self, now: float) -> list[int]:
        """Return those that start now, in the order they came; they hold memory from here on."""
        admitted: list[int] = []
        for request in [each for each in self._waiting if not each.is_late(now)]:
            first = replace(request, room=self._sizes.room_for(request, request.prompt + 1))
            first.held = self._sizes.grown(first, first.tier, first.room)
            if self._line or not self._has_room_for([*self._running.values(), first]):
                break
            self._running[request.id] = first
            self._waiting.remove(request)
            admitted.append(request.id)
        return admitted

    def finish(self, id: int, *, cancelled: bool = False) -> None:
        """Forget a request, running or not: it has given back its memory.

        A ``cancelled`` one says nothing about how often its class climbs, nor how long answers get.
        """
        request = self._running.pop(id, None)
        if request is None:
            self._waiting = [each for each in self._waiting if each.id != id]
        else:
            self._outlook.count(request, cancelled=cancelled)
        self._line.pop(id, None)

    def expired(self, now: float) -> list[int]:
        """Return those whose deadline has passed: end them, and say so with ``finish``."""
        return [each.id for each in self._all() if each.is_late(now)]

    # -- running requests --------------------------------------------------------------------------

    def ask_climb(self, id: int, tier: int, tokens: int = 0) -> bool:
        """Ask for a higher tier, for a text that may have got longer, ``tokens``, since ``grow``
        was told: True if it is given. Else one that drafts goes on as it is, and others stand still
        until ``granted`` names them; asking again meanwhile changes nothing.
        """
        request = self._running[id]
        assert request.tier < tier <= request.top, f"no climb from {request.tier} to {tier}"
        self._sizes.settle(request, tokens)
        ask = Grant(id, tier, max(request.room, self._sizes.room_for(request, tokens)))
        if request.drafts and (self._line or not self._can_give(ask, first=True)):
            return False
        self._outlook.decide(request, climbed=True)
        return self._ask(ask)

    def grow(self, id: int, tokens: int) -> bool:
        """Say how long a text is, or will be after the next step: never shorter than before.

        Always True where room is given as a whole. Else False if the next portion isn't free: it
        stands still until ``granted`` names it, and then grows.
        """
        request = self._running[id]
        assert tokens <= request.cap, f"{tokens} tokens, and {request.cap} were announced"
        assert tokens >= request.tokens, f"{tokens} tokens, after {request.tokens}"
        self._sizes.settle(request, tokens)
        if tokens > request.room:
            room = self._sizes.room_for(request, tokens)
            if not self._ask(Grant(id, request.tier, room)):
                return False
        request.tokens = tokens
        return True

    def granted(self) -> list[Grant]:
        """Return those of the line that now get what they waited for."""
        given = []
        for ask in list(self._line.values()):
            is_first = next(iter(self._line)) == ask.id
            if self._can_give(ask, first=is_first):
                del self._line[ask.id]
                self._give(ask)
                given.append(ask)
        return given

    def settle(self, id: int) -> None:
        """Say that a request stays at the tier it has: it neither climbs any more nor steps down,
        and if it is evicted it starts there again.
        """
        request = self._running[id]
        self._outlook.decide(request, climbed=False)
        self._line.pop(id, None)
        request.lowest = request.top = request.tier
        request.claim = self._sizes.claimed(request, request.tier)

    # -- preemption --------------------------------------------------------------------------------

    def resize(self, budget_bytes: int) -> None:
        """Change the budget; ``preemptions`` says who gives way. Raises InputError if a request
        that is here would never fit.
        """
        largest = max((self._sizes.largest(each) for each in self._all()), default=1)
        if budget_bytes - self._slot < largest:
            raise InputError(
                f"a budget of {budget_bytes} bytes for keys and values is too small for what is "
                f"here: give {largest + self._slot} or more"
            )
        self._budget = budget_bytes - self._slot

    def preemptions(self) -> list[Preemption]:
        """Return who gives memory back, youngest first: what it takes for a lowered budget, tiers
        before whole requests; else tiers alone, for the first of the line if that helps.
        """
        youngest = sorted(self._running.values(), key=lambda each: -each.order)
        if not self._is_safe():
            steps = self._step_down(youngest, until=self._is_safe)
            for request in youngest:
                if self._is_safe():
                    break
                self._evict(request)
                steps = [each for each in steps if each.id != request.id]
                steps.append(Preemption(request.id, None))
            return steps
        if not self._line:
            return []
        ask = next(iter(self._line.values()))
        younger = [each for each in youngest if each.order > self._running[ask.id].order]
        before = {each.id: each.tier for each in younger}
        steps = self._step_down(younger, until=lambda: self._can_give(ask, first=True))
        if self._can_give(ask, first=True):
            return steps
        for step in steps:
            self._give(Grant(step.id, before[step.id], self._running[step.id].room))
        return []

    # -- figures -----------------------------------------------------------------------------------

    def bytes_used(self) -> int:
        """Return what texts take at the lengths that ``grow`` told."""
        return sum(self.ladder.num_bytes(each.tier, each.tokens) for each in self._running.values())

    def bytes_held(self) -> int:
        """Return what is promised to running requests."""
        return sum(each.held for each in self._running.values())

    def state(self) -> SchedulerState:
        """Return figures to show."""
        running = list(self._running.values())
        return SchedulerState(
            budget_bytes=self._budget,
            used_bytes=self.bytes_used(),
            held_bytes=self.bytes_held(),
            hard_reserve_bytes=max((each.need for each in running), default=0),
            soft_reserve_bytes=self._outlook.soft_reserve(running, self._budget),
            running=len(running),
            asking=len(self._line),
            waiting=len(self._waiting),
            rates=self._outlook.rates.to_dict(),
        )

    # -- inside ------------------------------------------------------------------------------------

    @property
    def _free(self) -> int:
        return self._budget - self.bytes_held()

    def _all(self) -> Iterator[Account]:
        return chain(self._waiting, self._running.values())

    def _is_safe(self) -> bool:
        return is_safe(self._free, ((each.held, each.need) for each in self._running.values()))

    def _has_room_for(self, running: Sequence[Account]) -> bool:
        """Say whether these may run, the last of them as well; alone it stands still for nobody."""
        free = self._budget - sum(each.held for each in running)
        return (
            free >= max(each.need for each in running)
            and free >= self._outlook.soft_reserve(running, self._budget)
            and (len(running) == 1 or self._outlook.fits(running, self._budget))
        )

    def _ask(self, ask: Grant) -> bool:
        if ask.id in self._line:
            return False
        if not self._can_give(ask, first=not self._line):
            self._line[ask.id] = ask
            return False
        self._give(ask)
        return True

    def _can_give(self, ask: Grant, *, first: bool) -> bool:
        request, free = self._running[ask.id], self._free
        if not first:
            return request.need <= free
        held = self._sizes.grown(request, ask.tier, ask.room)
        need = self._sizes.claimed(request, ask.tier) - held
        others = ((o.held, o.need) for o in self._running.values() if o is not request)
        after = free - (held - request.held)
        return after >= 0 and is_safe(after, [*others, (held, need)])

    def _give(self, ask: Grant) -> None:
        request = self._running[ask.id]
        request.tier, request.room = ask.tier, ask.room
        request.held = self._sizes.grown(request, ask.tier, ask.room)
        request.claim = self._sizes.claimed(request, ask.tier)

    def _step_down(self, some: Sequence[Account], *, until: Callable[[], bool]) -> list[Preemption]:
        """Let those go to their lowest tier that need less there: not short texts, which get room
        for drafts, nor those that wait in line.
        """
        steps = []
        for request in some:
            if until():
                break
            less = self._sizes.claimed(request, request.lowest) < request.claim
            if request.drafts and less and request.id not in self._line:
                self._give(Grant(request.id, request.lowest, request.room))
                steps.append(Preemption(request.id, request.lowest))
        return steps

    def _evict(self, request: Account) -> None:
        del self._running[request.id]
        self._line.pop(request.id, None)
        request.prompt = max(request.prompt, request.tokens)
        request.tier, request.tokens, request.settled = request.lowest, 0, 0
        request.room = request.held = 0
        request.claim = self._sizes.claimed(request, request.tier)
        self._waiting = sorted([*self._waiting, request], key=lambda each: each.order)
