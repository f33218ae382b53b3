"""The requests that have memory: what becomes of them between two steps, and in one.

All of it happens in the engine's thread. What callers also look at is guarded by ``lock``.
"""

import threading
import time
from typing import Any

import torch

from ..errors import InputError, PlacementError
from .active import Active, Phase
from .batch import Rows
from .bounds import Kind, RequestError, kind_of
from .calibrated import CalibratedBounds
from .generation import Event, Finish
from .kept_logits import KeptLogits
from .kv.originals import Originals, OriginalsFolder
from .kv.pages import RequestStates
from .kv.prefixes import Prefixes, adopt, write_originals
from .ladder import Ladder, num_pages
from .measuring import AuditPass, describe_answer, pass_over
from .scheduler import Scheduler
from .served import ServedModel
from .waiting import EngineStats, Waiting, tell, unstarted

STEP_TOKENS = 512
"""Rows of prompts in a step at most: others wait for it."""


class Runner:
    """Starts, climbs, computes and ends requests."""

    def __init__(
        self,
        served: ServedModel,
        ladder: Ladder,
        folder: OriginalsFolder,
        scheduler: Scheduler,
        lock: threading.Condition,
        *,
        fixed_bytes: int,
        kv_budget: int,
        calibrated: CalibratedBounds,
        prefix_bytes: int,
    ) -> None:
        self.served, self.ladder, self.folder = served, ladder, folder
        self.scheduler, self.lock = scheduler, lock
        self.active: dict[int, Active] = {}
        self.waiting: dict[int, Waiting] = {}
        self._entries: dict[int, Waiting] = {}
        """Of the active ones, what they waited as."""
        self.stats = EngineStats(kv_budget=kv_budget, kv_bytes=fixed_bytes)
        self.calibrated = calibrated
        self.prefixes = Prefixes(prefix_bytes)
        self._fixed_bytes = fixed_bytes
        self._next_number = 0

    def enqueue(self, **of: Any) -> int:
        """Put a request at the end of those that wait, and return its number: see ``Waiting``.

        The lock is held. Raises RequestError where it can never fit.
        """
        number = self._next_number
        waiting = Waiting(number=number, **of)
        request, kind = waiting.request, kind_of(waiting.request.bound)
        given = waiting.tier is not None
        tier = waiting.first_tier(self.ladder.full)
        self.scheduler.submit(
            number,
            len(request.prompt),
            request.max_new_tokens,
            tier=tier,
            top_tier=tier if given else self.ladder.full,
            deadline=request.deadline,
            kind="given" if given else kind,
            drafts=kind is Kind.VERIFIED and not given,
        )
        self._next_number += 1
        self.waiting[number] = waiting
        return number

    def go_on(self) -> bool:
        """Make a step; False if nobody can go on."""
        with self.lock:
            preemptions = self.scheduler.preemptions()
        for preemption in preemptions:
            self._preempt(self.active[preemption.id], preemption.tier)
        with self.lock:
            if preemptions:
                self._count_bytes()
                self.lock.notify_all()
            admitted = [self.waiting.pop(each) for each in self.scheduler.admit(time.monotonic())]
        for waiting in admitted:
            self._start(waiting)
        self._judge()
        self._climb()
        work = self._gather_rows()
        if work:
            self._step(work)
        return bool(work)

    def drop(self, cancelled: set[int], stopped: set[int]) -> None:
        """End those that are cancelled, those that have enough, and those that are late."""
        with self.lock:
            late = set(self.scheduler.expired(time.monotonic()))
            ended = cancelled | stopped | late
            waiting = [self.waiting.pop(each) for each in ended if each in self.waiting]
            for each in waiting:
                self.scheduler.finish(each.number, cancelled=True)
                if each.before is not None:  # it was evicted, and has an answer so far
                    self.active[each.number], self._entries[each.number] = each.before, each
        for number in sorted(ended & self.active.keys()):
            active = self.active[number]
            active.finish = Finish.DEADLINE if number in late else Finish.CANCELLED
            if number in stopped:
                active.finish = Finish.STOP
            self._end(active)
        for each in (one for one in waiting if one.before is None):
            finish = Finish.DEADLINE if each.number in late else Finish.CANCELLED
            self.stats.cancelled += 1
            tell(each.on_event, unstarted(each.request, finish, self.ladder.names[0]))

    def _start(self, waiting: Waiting) -> None:
        originals = None
        try:
            tier = waiting.first_tier(self.ladder.full)
            states, originals, adopted = self._allocate(waiting, tier)
            active = self._activate(waiting, states, originals, tier)
        except Exception as error:
            if originals is not None:
                originals.close()
            with self.lock:
                self.scheduler.finish(waiting.number, cancelled=True)
            self.stats.failed += 1
            tell(waiting.on_event, error)
            return
        active.adopted_tokens = adopted
        self.stats.adopted_tokens += adopted
        self.active[waiting.number] = active
        self._entries[waiting.number] = waiting
        self.stats.most_running = max(self.stats.most_running, len(self.active))

    def _activate(
        self, waiting: Waiting, states: RequestStates, originals: Originals | None, tier: int
    ) -> Active:
        if waiting.before is not None:
            waiting.before.begin_again(states, originals, tier)
            return waiting.before
        if waiting.answer is not None:
            assert waiting.on_measured is not None
            return AuditPass(
                waiting.number,
                waiting.answer,
                waiting.on_measured,
                self.ladder.names[waiting.answer.tier],
                states=states,
                originals=originals,
            )
        active = Active(
            waiting.number,
            waiting.request,
            waiting.on_event,
            states=states,
            originals=originals,
            tier=tier,
            top=self.ladder.full,
            given=waiting.tier is not None,
        )
        if active.kind is Kind.CALIBRATED and waiting.on_measured is None:
            waiting.on_measured = self.calibrated.draw(waiting.number, waiting.request)
        if waiting.on_measured is not None:
            active.kept_logits = KeptLogits(self.folder)
        return active

    def _allocate(self, waiting: Waiting, tier: int) -> tuple[RequestStates, Originals | None, int]:
        """Return states, originals below them, and how many tokens of the text are there already:
        those of a beginning that is known.
        """
        request, shape = waiting.request, self.served.shape
        before = waiting.before
        tokens = before.tokens[: before.passed] if before else request.prompt
        found = self.prefixes.find(tokens) if waiting.answer is None else None
        if found is not None:
            states = RequestStates(shape, self.ladder.tiers[tier], dtype=self.served.dtype)
            try:
                adopt(states, found, self.served.slot.take())
            except PlacementError:  # it is computed, then
                self.prefixes.forget(found)
                found = None
        if found is None:
            states = RequestStates(shape, self.ladder.tiers[tier], dtype=self.served.dtype)
        pages = num_pages(len(request.prompt) + request.max_new_tokens)
        if not pages or tier == self.ladder.full:
            return states, None, states.length
        base = found.base() if found is not None else None
        try:
            return states, Originals(self.folder, shape, pages, base=base), states.length
        except BaseException:
            if base is not None:
                base[0].close()
            raise

    def _preempt(self, active: Active, tier: int | None) -> None:
        """Have a request step down to a tier; None: give all back, and wait."""
        if tier is None:
            active.give_up_states()
            self.stats.evictions += 1
            with self.lock:
                del self.active[active.number]
                waiting = self._entries.pop(active.number)
                waiting.before = active
                self.waiting[active.number] = waiting
            return
        try:
            try:
                active.states.demote(self.ladder.tiers[tier])
            except InputError:  # somewhere the lower tier has more bits
                self.served.slot.rebuild(active.states, self.ladder.tiers[tier], active.originals)
            active.has_stepped_down(tier)
            self.stats.step_downs += 1
        except Exception as error:
            self._fail(active, error)

    def _climb(self) -> None:
        """Let those climb that ask now, and those that have waited, if there is room."""
        with self.lock:
            allowed = {grant.id: grant.tier for grant in self.scheduler.granted()}
            for active in self.active.values():
                if active.phase is Phase.CLIMB and not active.asked:
                    if self.scheduler.ask_climb(active.number, active.tier + 1, len(active.tokens)):
                        allowed[active.number] = active.tier + 1
                    active.has_asked()
        for number, tier in allowed.items():
            active = self.active[number]
            if tier == active.tier:  # room was what it waited for
                continue
            try:
                self.served.slot.rebuild(active.states, self.ladder.tiers[tier], active.originals)
                active.has_climbed(tier)
                self.stats.escalations += 1
            except Exception as error:
                self._fail(active, error)

    def _judge(self) -> None:
        """Say of those under a calibrated bound whether their tier is enough."""
        for active in [each for each in self.active.values() if each.phase is Phase.JUDGE]:
            try:
                active.judge(self.calibrated.bound(active))
            except Exception as error:
                self._fail(active, error)
                continue
            if active.is_decided:
                with self.lock:
                    self.scheduler.settle(active.number)

    def _gather_rows(self) -> list[tuple[Active, Rows]]:
        room, found = STEP_TOKENS, []
        for active in self.active.values():
            with self.lock:  # drafted tokens have room of their own
                if not self.scheduler.grow(active.number, len(active.tokens)):
                    continue
            rows = active.next_rows(room)
            if rows is not None:
                found.append((active, rows))
                if active.phase is Phase.PROMPT:
                    room -= len(rows.ids)
        return sorted(found, key=lambda each: each[1].is_pass)

    def _step(self, work: list[tuple[Active, Rows]]) -> None:
        try:
            kept = self.served.run([rows for _, rows in work])
        except Exception as error:
            for active, _ in work:
                self._fail(active, error)
            return
        self.stats.steps += 1
        self.stats.running_steps += len(work)
        for (active, rows), logits in zip(work, kept, strict=True):
            try:
                if rows.failure is not None:
                    raise rows.failure
                active.take(logits)
            except Exception as error:
                self._fail(active, error)
        self._count_bytes()
        for active in list(self.active.values()):
            if active.finish is not None:
                self._end(active)

    def _count_bytes(self) -> None:
        held = sum(active.count_bytes() for active in self.active.values())
        self.stats.hold(self._fixed_bytes + held)

    def _fail(self, active: Active, error: Exception) -> None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            error = PlacementError(f"no memory left for the request ({error})")
        self.stats.failed += 1
        self._leave(active, error)

    def _end(self, active: Active) -> None:
        tier = self.ladder.names[active.tier]
        if not isinstance(active, AuditPass):  # nobody asked for it
            self.stats.count(active, tier)
        self._leave(active, active.outcome(tier))

    def _leave(self, active: Active, last: Event) -> None:
        whole = active.finish in (Finish.STOP, Finish.LENGTH)
        self._keep(active, whole)
        if active.kept_logits and active.finish not in (None, Finish.CANCELLED):
            self._measure(active, self._entries[active.number])
        with self.lock:
            del self.active[active.number], self._entries[active.number]
            self.scheduler.finish(active.number, cancelled=not whole)
            self._count_bytes()
            self.lock.notify_all()
        tell(active.on_event, last)

    def _keep(self, active: Active, whole: bool) -> None:
        """Keep what was computed of a text's beginning, or throw it away."""
        originals, active.originals = active.originals, None
        tokens = list(active.request.prompt)
        if not whole or isinstance(active, AuditPass):
            if originals is not None:
                originals.close()
            return
        if active.kind in (Kind.FULL, Kind.VERIFIED):  # what they wrote is the full model's, too
            tokens = active.tokens
        if originals is None and active.kind is Kind.FULL and num_pages(len(tokens)):
            try:
                originals = write_originals(self.folder, active.states)
            except PlacementError:  # a full disk: nothing is lost but time
                return
        if originals is not None:
            self.prefixes.keep(tokens, originals, active.states)

    def _measure(self, active: Active, entry: Waiting) -> None:
        """Have an answer measured; whatever comes of it is told once."""
        on_measured = entry.on_measured
        assert on_measured is not None
        if active.kind is Kind.CALIBRATED and active.tier == self.ladder.full:  # there is no error
            tell(on_measured, describe_answer(active, (), self.ladder.names[-1]))
            return
        active.give_up_states()  # while it waits, others have the memory
        try:
            with self.lock:
                self.enqueue(**pass_over(active, on_measured))
        except RequestError as error:
            tell(on_measured, error)
