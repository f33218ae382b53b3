"""Packing requests by the tier they are at: memory is never short, and nothing gets stuck."""

import itertools
import os
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.errors import InputError
from lib.progressive.bounds import RequestError
from lib.progressive.decisions import Grant, Preemption
from lib.progressive.ladder import KvShape, make_ladder
from lib.progressive.reserve import EscalationRates, is_safe, probable_bytes
from lib.progressive.scheduler import Scheduler

LADDER = make_ladder(KvShape(layers=1, heads=2, key_dim=64, value_dim=64, itemsize=4))
FULL = LADDER.full
LONG = 1200
"""Tokens: 17 pages and the tail."""
EXAMPLES = int(os.environ.get("CONTROL_EXAMPLES", "100"))


def size(tier: int, tokens: int = LONG) -> int:
    return LADDER.peak_bytes(tier, tokens)


def make(fulls: float, **settings: Any) -> Scheduler:
    """Return a scheduler with room for so many full texts of ``LONG``."""
    return Scheduler(LADDER, int(fulls * size(FULL)), **{"soft_quantile": 0.0, **settings})


def submit(scheduler: Scheduler, *ids: int, **more: Any) -> None:
    for each in ids:
        arguments = {"tier": 0, "top_tier": FULL, "drafts": False, **more}
        scheduler.submit(each, LONG - 200, 200, **arguments)


# -- the state -------------------------------------------------------------------------------------


@given(
    free=st.integers(-2, 12),
    holders=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 12)), max_size=5),
)
def test_a_state_is_safe_if_and_only_if_an_order_works(
    free: int, holders: list[tuple[int, int]]
) -> None:
    def works(order: tuple[tuple[int, int], ...]) -> bool:
        left = free
        for held, needed in order:
            if needed > left:
                return False
            left += held
        return free >= 0

    assert is_safe(free, holders) == any(map(works, itertools.permutations(holders)))


@given(
    climbs=st.lists(
        st.tuples(st.integers(1, 40), st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])), max_size=8
    ),
    quantile=st.sampled_from([0.0, 0.5, 0.95]),
)
def test_the_soft_reserve_is_the_quantile_of_all_outcomes(
    climbs: list[tuple[int, float]], quantile: float
) -> None:
    chance_of: dict[int, float] = {}
    for climbed in itertools.product([False, True], repeat=len(climbs)):
        total, chance = 0, 1.0
        for (num_bytes, rate), did in zip(climbs, climbed, strict=True):
            total, chance = total + did * num_bytes, chance * (rate if did else 1 - rate)
        chance_of[total] = chance_of.get(total, 0.0) + chance
    below, expected = 0.0, 0
    for total in sorted(chance_of):
        expected, below = total, below + chance_of[total]
        if below >= quantile - 1e-9:
            break
    assert probable_bytes(climbs, quantile=quantile, budget_bytes=1024) == expected


def test_a_class_that_was_never_seen_is_taken_to_climb() -> None:
    rates = EscalationRates({"easy": (0, 59)})
    assert rates.upper("new") == 1
    assert rates.upper("easy") == pytest.approx(1 - 0.05 ** (1 / 59))
    rates.count("new", climbed=False)
    assert rates.upper("new") == pytest.approx(0.95)
    assert rates.to_dict() == {"easy": (0, 59), "new": (0, 1)}


# -- admission -------------------------------------------------------------------------------------


def test_as_many_run_as_their_tiers_and_one_escalation_take() -> None:
    scheduler = make(10)
    submit(scheduler, *range(80))
    admitted = scheduler.admit(0)
    assert admitted == list(range(len(admitted)))
    fits = (10 * size(FULL) - (size(FULL) - size(0))) // size(0)
    assert len(admitted) == fits > 30
    assert scheduler.admit(0) == []
    state = scheduler.state()
    assert (state.running, state.waiting, state.asking) == (fits, 80 - fits, 0)
    assert state.hard_reserve_bytes == size(FULL) - size(0)
    assert state.held_bytes + state.hard_reserve_bytes <= state.budget_bytes
    scheduler.finish(0)
    assert scheduler.admit(0) == [fits]


def test_full_requests_keep_nothing_back() -> None:
    scheduler = make(10)
    submit(scheduler, *range(20), tier=FULL)
    assert len(scheduler.admit(0)) == 10


def test_the_slot_that_all_share_is_taken_off_once() -> None:
    scheduler = make(10, slot_bytes=size(FULL) // 2)
    submit(scheduler, *range(20), tier=FULL)
    assert len(scheduler.admit(0)) == 9
    with pytest.raises(InputError, match="no room beside"):
        Scheduler(LADDER, 100, slot_bytes=100)


def test_what_never_fits_is_refused_at_once() -> None:
    scheduler = make(0.99)
    with pytest.raises(RequestError, match=rf"take {size(FULL)} bytes.*tier full.*budget is") as e:
        submit(scheduler, 1)
    assert (e.value.param, e.value.code) == ("max_tokens", "kv_budget_exceeded")
    submit(scheduler, 1, top_tier=1)
    assert scheduler.admit(0) == [1]


def test_none_is_passed_by_for_being_large() -> None:
    scheduler = make(2)
    submit(scheduler, 1, tier=FULL)
    submit(scheduler, 2, tier=FULL)
    submit(scheduler, 3, tier=FULL)
    scheduler.submit(4, 10, 10, tier=FULL, top_tier=FULL)
    assert scheduler.admit(0) == [1, 2]
    scheduler.finish(2)
    assert scheduler.admit(0) == [3]
    scheduler.finish(1)
    assert scheduler.admit(0) == [4]


def test_probable_climbs_are_kept_room_for() -> None:
    history = {"easy": (3, 1000), "hard": (500, 1000)}
    running = {}
    for kind in ("easy", "hard", "new"):
        scheduler = make(10, soft_quantile=0.95, history=history)
        submit(scheduler, *range(80), kind=kind)
        running[kind] = len(scheduler.admit(0))
    none_kept = make(10)
    submit(none_kept, *range(80))
    assert running["easy"] >= len(none_kept.admit(0)) - 5
    assert 10 < running["hard"] < running["easy"] / 2
    assert running["new"] == 10


def test_rates_count_each_request_once_when_it_is_decided() -> None:
    scheduler = make(4)
    submit(scheduler, *range(5), kind="some")
    submit(scheduler, 5, tier=FULL, kind="full")
    scheduler.admit(0)
    scheduler.ask_climb(0, 1)
    scheduler.ask_climb(0, 2)
    scheduler.settle(1)
    scheduler.finish(1)
    scheduler.finish(2)
    scheduler.finish(3, cancelled=True)
    scheduler.finish(5)
    assert scheduler.state().rates == {"some": (1, 3)}


# -- the line --------------------------------------------------------------------------------------


def test_a_climb_that_doesnt_fit_waits_and_is_first() -> None:
    scheduler = make(2, history={})
    submit(scheduler, *range(30))
    running = scheduler.admit(0)
    climbing = 0
    while scheduler.ask_climb(running[climbing], FULL):
        climbing += 1
    assert climbing >= 1
    assert scheduler.ask_climb(running[climbing], FULL) is False  # it stands in the line already
    scheduler.finish(running[-1])
    assert scheduler.granted() == []
    assert scheduler.admit(0) == []  # though there is room
    scheduler.finish(running[0])
    assert scheduler.granted() == [Grant(running[climbing], FULL, LONG)]
    assert scheduler.granted() == []
    for each in range(1, climbing + 1):
        scheduler.finish(each)
    assert scheduler.admit(0)


def test_a_step_that_would_block_both_is_not_given() -> None:
    """Each could take a part, and neither the rest: who came first finishes."""
    budget = size(0) + size(FULL)
    scheduler = Scheduler(LADDER, budget, soft_quantile=0.0)
    submit(scheduler, 1, 2)
    assert scheduler.admit(0) == [1, 2]
    assert scheduler.ask_climb(1, 3)
    assert not scheduler.ask_climb(2, 1)
    assert scheduler.ask_climb(1, FULL)  # behind 2 in line, but it can finish
    assert scheduler.granted() == []
    scheduler.finish(1)
    assert scheduler.granted() == [Grant(2, 1, LONG)]
    assert scheduler.ask_climb(2, FULL)


def test_settled_requests_need_nothing_more() -> None:
    scheduler = make(10)
    submit(scheduler, *range(80))
    first = scheduler.admit(0)
    assert scheduler.ask_climb(0, 2)
    for each in first:
        scheduler.settle(each)
    assert scheduler.state().hard_reserve_bytes == 0
    assert scheduler.preemptions() == []
    assert scheduler.bytes_held() == size(2) + (len(first) - 1) * size(0)


def test_the_present_length_counts_as_used() -> None:
    scheduler = make(2)
    submit(scheduler, 1)
    scheduler.admit(0)
    assert scheduler.bytes_used() == LADDER.num_bytes(0, 0)
    assert scheduler.grow(1, 300)
    assert scheduler.bytes_used() == LADDER.num_bytes(0, 300) <= scheduler.bytes_held()
    with pytest.raises(AssertionError, match="1200 were announced"):
        scheduler.grow(1, 1201)


def test_room_in_portions_lets_more_run_where_answers_are_short_and_one_may_wait() -> None:
    whole, portions = make(3), make(3, growth_tokens=64)
    for scheduler in (whole, portions):
        for each in range(60):
            scheduler.submit(each, 100, 1100, tier=FULL, top_tier=FULL)
    assert len(whole.admit(0)) == len(portions.admit(0)) == 3  # nothing is known of them
    ended = 0
    while ended < 30:
        assert portions.grow(ended, 110)
        portions.finish(ended)
        ended += 1
        portions.admit(0)
    assert portions.state().running > 10
    first, second, *others = range(ended, ended + portions.state().running)
    for tokens in range(133, 1200, 64):
        assert portions.grow(first, tokens)  # what is kept back is enough for one
    tokens = 133
    while portions.grow(second, tokens):
        tokens += 64
    assert tokens < 1200
    for each in others:
        portions.finish(each)
    assert portions.granted() == [Grant(second, FULL, tokens + 63)]
    assert portions.grow(second, tokens)


# -- deadlines and preemption ----------------------------------------------------------------------


def test_late_ones_are_named_and_not_started() -> None:
    scheduler = make(1)
    submit(scheduler, 1, 2, tier=FULL, deadline=5.0)
    submit(scheduler, 3, tier=FULL)
    assert scheduler.admit(4.9) == [1]
    assert scheduler.expired(4.9) == []
    assert scheduler.expired(5.0) == [2, 1]
    scheduler.finish(1, cancelled=True)
    assert scheduler.admit(5.0) == [3]
    scheduler.finish(2, cancelled=True)
    assert scheduler.expired(9.0) == []


def test_a_younger_one_steps_down_for_an_older() -> None:
    scheduler = make(2)
    submit(scheduler, 1, 2)
    submit(scheduler, 3, drafts=True)
    assert scheduler.admit(0) == [1, 2, 3]
    assert scheduler.ask_climb(3, FULL)
    assert not scheduler.ask_climb(1, FULL)
    assert scheduler.granted() == []
    assert scheduler.preemptions() == [Preemption(3, 0)]
    assert scheduler.granted() == [Grant(1, FULL, LONG)]
    assert scheduler.preemptions() == []
    assert not scheduler.ask_climb(3, FULL)
    scheduler.finish(1)
    assert scheduler.granted() == []  # it did not wait
    assert scheduler.ask_climb(3, FULL)


def test_what_drafts_waits_for_no_climb_and_keeps_nothing_back() -> None:
    scheduler = make(10)
    submit(scheduler, *range(80), drafts=True)
    admitted = scheduler.admit(0)
    assert len(admitted) == 10 * size(FULL) // size(0)
    assert scheduler.state().hard_reserve_bytes == 0
    assert not scheduler.ask_climb(0, FULL)
    assert scheduler.state().asking == 0
    assert scheduler.state().rates == {}  # nothing is decided
    for each in admitted[1:]:
        scheduler.finish(each)
    assert scheduler.ask_climb(0, FULL)
    assert scheduler.state().rates == {"": (1, len(admitted))}


@pytest.mark.parametrize("tier", [1, FULL])
def test_a_climb_takes_room_for_what_a_check_has_made_of_the_text(tier: int) -> None:
    scheduler = make(3, growth_tokens=16, window=17)
    submit(scheduler, 1, drafts=True)
    scheduler.admit(0)
    assert scheduler.grow(1, 1028)  # the end of a block
    assert scheduler.ask_climb(1, tier, 1045)
    assert scheduler.bytes_held() >= LADDER.num_bytes(tier, 1045)
    held = scheduler.bytes_held()
    assert scheduler.grow(1, 1045) and scheduler.bytes_held() == held


def test_who_just_fits_is_admitted_alone() -> None:
    """Whatever is kept back for its climb, which is rounded."""
    for length in range(60, LONG, 7):
        for growth in (None, 16):
            scheduler = Scheduler(LADDER, LADDER.peak_bytes(FULL, length), growth_tokens=growth)
            scheduler.submit(1, length - 10, 10, tier=0, top_tier=FULL)
            assert scheduler.admit(0) == [1]


def test_none_steps_down_where_that_is_not_enough_or_not_allowed() -> None:
    scheduler = make(2)
    submit(scheduler, 1, 2)
    submit(scheduler, 3, drafts=True)
    scheduler.admit(0)
    assert scheduler.ask_climb(1, FULL)
    assert scheduler.ask_climb(3, 1)
    held = scheduler.bytes_held()
    assert not scheduler.ask_climb(2, FULL)
    assert scheduler.preemptions() == []
    assert scheduler.bytes_held() == held


def test_a_short_text_does_not_step_down_to_take_more() -> None:
    """In full it has no room for drafts, and compact no page."""
    scheduler = make(3, growth_tokens=16, window=16)
    scheduler.submit(0, 500, 100, tier=FULL, top_tier=FULL)
    scheduler.submit(1, 500, 100, tier=0, top_tier=FULL, drafts=True)
    scheduler.submit(2, 60, 30, tier=0, top_tier=FULL, drafts=True)
    assert scheduler.admit(0) == [0, 1, 2]
    assert scheduler.ask_climb(1, FULL, 501) and scheduler.ask_climb(2, FULL, 61)
    scheduler.resize(scheduler.bytes_held() - 1)
    assert scheduler.preemptions() == [Preemption(1, 0)]


def test_a_lower_budget_takes_tiers_before_requests_and_the_youngest_first() -> None:
    scheduler = make(4)
    submit(scheduler, 1)
    submit(scheduler, 2, 3, drafts=True)
    submit(scheduler, 4, tier=FULL)
    assert scheduler.admit(0) == [1, 2, 3, 4]
    assert scheduler.ask_climb(2, FULL)
    assert scheduler.preemptions() == []
    scheduler.grow(4, 700)
    scheduler.resize(3 * size(FULL))
    assert scheduler.preemptions() == []
    scheduler.resize(2 * size(FULL))
    assert scheduler.preemptions() == [Preemption(2, 0)]
    scheduler.resize(int(1.4 * size(FULL)))
    assert scheduler.preemptions() == [Preemption(4, None)]
    assert scheduler.admit(0) == []
    for each in (1, 2, 3):
        scheduler.finish(each)
    assert scheduler.admit(0) == [4]
    assert scheduler.bytes_held() == size(FULL)
    with pytest.raises(InputError, match=f"give {size(FULL)} or more"):
        scheduler.resize(size(FULL) - 1)


# -- how many run ----------------------------------------------------------------------------------


def run_closed_loop(scheduler: Scheduler, climbing: float, *, calibrated: bool) -> float:
    """Return how many of 80 clients' requests run on average: a share climbs to full, right after
    the prompt or early in the answer.
    """
    draw = random.Random(1)
    lengths: dict[int, int] = {}
    climbs_at: dict[int, int] = {}
    stands: set[int] = set()
    submitted, ended, sums = 0, 0, []
    while ended < 200:
        while submitted < ended + 80:
            submit(scheduler, submitted, kind="some", top_tier=1)
            if draw.random() < climbing:
                climbs_at[submitted] = 0 if calibrated else int(200 * draw.random() ** 2)
            submitted += 1
        stands -= {grant.id for grant in scheduler.granted()}
        lengths |= dict.fromkeys(scheduler.admit(0), LONG - 200)
        sums += [len(lengths)] if ended >= 80 else []
        for each in sorted(lengths.keys() - stands):
            if climbs_at.get(each, 200) <= lengths[each] - LONG + 200:
                del climbs_at[each]
                if not scheduler.ask_climb(each, 1):
                    stands.add(each)
                    continue
            if calibrated:
                scheduler.settle(each)
            lengths[each] += 20
            scheduler.grow(each, lengths[each])
            if lengths[each] == LONG:
                scheduler.finish(each)
                del lengths[each]
                ended += 1
    return sum(sums) / len(sums)


@pytest.mark.parametrize(("climbing", "calibrated"), [(0.0, True), (0.3, True), (0.3, False)])
def test_as_many_run_as_the_identity_says_less_the_reserve(
    climbing: float, calibrated: bool
) -> None:
    ladder = LADDER.restrict("K6V5")
    compact, full = ladder.peak_bytes(0, LONG), ladder.peak_bytes(1, LONG)
    scheduler = Scheduler(
        ladder,
        20 * full,
        history={"some": (round(1000 * climbing), 1000)},
        soft_quantile=0.95 if calibrated else 0.5,
    )
    identity = 20 / (compact / full + (1 - compact / full) * climbing)
    found = run_closed_loop(scheduler, climbing, calibrated=calibrated)
    assert 0.85 * identity < found < 1.05 * identity


# -- any trace -------------------------------------------------------------------------------------


@dataclass(slots=True)
class Job:
    id: int
    prompt: int
    new: int
    mode: str
    wants: list[tuple[int, int]]
    """(tokens, tier): from this length on, no lower tier will do."""
    deadline: float | None
    tokens: int = 0
    pages_of: int = 0
    """Tokens whose pages are made: all of them once there is to be another."""
    tier: int = 0
    settled: bool = False
    waits: bool = False


@dataclass
class Machine:
    """Carries out what is decided, and asserts that it can."""

    scheduler: Scheduler
    budget: int
    window: int = 0
    in_portions: bool = False
    jobs: dict[int, Job] = field(default_factory=dict)
    running: set[int] = field(default_factory=set)
    evicted: set[int] = field(default_factory=set)
    now: float = 0.0
    submitted: int = 0
    done: int = 0

    def submit(self, prompt: int, new: int, mode: str, wants: Any, wait: float | None) -> None:
        job = Job(self.submitted, prompt, new, mode, sorted(wants), wait and self.now + wait)
        self.submitted += 1
        start, top = (FULL, FULL) if mode == "full" else (0, FULL)
        try:
            self.scheduler.submit(
                job.id,
                prompt,
                new,
                tier=start,
                top_tier=top,
                deadline=job.deadline,
                kind=mode,
                drafts=mode == "verified",
            )
        except RequestError:
            window = self.window if mode == "verified" else 0
            below = LADDER.peak_bytes(FULL - 1, prompt + new, window=window)
            assert max(size(FULL, prompt + new), below) > self.budget
            self.done += 1
            return
        job.tier = start
        self.jobs[job.id] = job

    def step(self, job: Job) -> None:
        """Prefill, or climb, or make up to 40 tokens, or finish."""
        assert job.id in self.running and not job.waits
        wanted = max((tier for tokens, tier in job.wants if tokens <= job.tokens), default=0)
        if not job.tokens:
            self._grow(job, job.prompt)
        elif job.mode == "calibrated" and not job.settled:
            wanted = max((tier for _, tier in job.wants), default=0)
            if wanted > job.tier:
                self._climb(job, wanted)
            if not job.waits:
                self.scheduler.settle(job.id)
                job.settled = True
        elif job.mode == "verified" and wanted > job.tier:
            self._climb(job, job.tier + 1)
        elif job.tokens < job.prompt + job.new:
            self._grow(job, min(job.tokens + 40, job.prompt + job.new))
        else:
            self.end(job)

    def _grow(self, job: Job, tokens: int) -> None:
        job.pages_of = job.tokens if tokens > job.tokens else job.pages_of
        if self.scheduler.grow(job.id, tokens):
            job.tokens = tokens
        else:
            assert self.in_portions
            job.waits = True

    def _climb(self, job: Job, tier: int) -> None:
        """Climb; a check has just made the text longer."""
        checked = self.window if job.mode == "verified" else 0
        tokens = min(job.tokens + checked, job.prompt + job.new)
        job.pages_of = job.tokens if tokens > job.tokens else job.pages_of
        if self.scheduler.ask_climb(job.id, tier, tokens):
            job.tier, job.tokens = tier, tokens
            assert self.scheduler.grow(job.id, tokens), "it came with the climb"
        elif job.mode == "verified":
            job.wants.clear()
        else:
            job.waits = True

    def end(self, job: Job, *, cancelled: bool = False) -> None:
        self.scheduler.finish(job.id, cancelled=cancelled)
        self.running.discard(job.id)
        del self.jobs[job.id]
        self.done += 1

    def settle_all(self) -> bool:
        """Carry out what the scheduler decides; say whether anything was."""
        late = self.scheduler.expired(self.now)
        for each in late:
            self.end(self.jobs[each], cancelled=True)
        assert all(j.deadline is None or j.deadline > self.now for j in self.jobs.values())
        steps = self.scheduler.preemptions()
        for step in steps:
            job = self.jobs[step.id]
            if step.tier is None:
                job.prompt, job.new = (
                    max(job.prompt, job.tokens),
                    job.new - max(0, job.tokens - job.prompt),
                )
                job.tokens, job.pages_of, job.waits = 0, 0, False
                job.tier = job.tier if job.settled or job.mode == "full" else 0
                self.running.remove(job.id)
                self.evicted.add(job.id)
            else:
                assert job.mode == "verified" and step.tier == 0 < job.tier and not job.waits
                job.tier = step.tier
        self.check()
        grants = self.scheduler.granted()
        for grant in grants:
            job = self.jobs[grant.id]
            assert job.waits
            job.waits, job.tier = False, grant.tier
        self.check()
        waiting = sorted(self.jobs.keys() - self.running)
        admitted = self.scheduler.admit(self.now)
        assert admitted == waiting[: len(admitted)]
        self.running |= set(admitted)
        self.check()
        return bool(late or steps or grants or admitted)

    def check(self) -> None:
        running = [self.jobs[id] for id in self.running]
        used = sum(LADDER.num_bytes(job.tier, job.tokens) for job in running)
        most = sum(self._most(job) for job in running)
        assert used == self.scheduler.bytes_used() <= self.scheduler.bytes_held() <= self.budget
        assert most <= self.scheduler.bytes_held()

    def _most(self, job: Job) -> int:
        """Return what a text takes before its last page is made, with drafted tokens behind it."""
        window = self.window if job.mode == "verified" and job.tier < FULL else 0
        return LADDER.peak_bytes(job.tier, job.tokens, start=job.pages_of, window=window)

    def drain(self) -> None:
        """Nothing more comes: all that is there ends, and something moves in every round."""
        while self.jobs:
            moved = self.settle_all()
            for each in sorted(self.running):
                if each in self.running and not self.jobs[each].waits:
                    self.step(self.jobs[each])
                    moved = True
            assert moved, "stuck"


JOBS = st.tuples(
    st.integers(20, 500),
    st.integers(0, 300),
    st.sampled_from(["full", "verified", "verified", "calibrated"]),
    st.lists(st.tuples(st.integers(0, 800), st.integers(0, FULL)), max_size=3),
    st.one_of(st.none(), st.none(), st.none(), st.floats(1, 30)),
)
EVENTS = st.one_of(
    st.tuples(st.just("submit"), JOBS),
    st.tuples(st.just("step"), st.integers(0, 99)),
    st.tuples(st.just("all"), st.integers(1, 6)),
    st.tuples(st.just("cancel"), st.integers(0, 99)),
    st.tuples(st.just("time"), st.floats(0, 2)),
    st.tuples(st.just("resize"), st.floats(0.5, 2)),
)


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    fulls=st.floats(0.6, 3),
    growth=st.sampled_from([None, None, 16, 128]),
    quantile=st.sampled_from([0.0, 0.0, 0.95]),
    window=st.sampled_from([0, 17]),
    first=st.lists(JOBS, min_size=4, max_size=12),
    events=st.lists(EVENTS, min_size=5, max_size=30),
)
def test_any_trace_stays_within_the_budget_and_ends(
    fulls: float,
    growth: int | None,
    quantile: float,
    window: int,
    first: list[tuple[Any, ...]],
    events: list[tuple[Any, ...]],
) -> None:
    """The machine asserts the budget, the order of admission and that something always moves."""
    budget = int(fulls * size(FULL, 800))
    scheduler = Scheduler(
        LADDER, budget, growth_tokens=growth, soft_quantile=quantile, window=window
    )
    machine = Machine(scheduler, budget, window, growth is not None)
    for kind, *rest in [*(("submit", job) for job in first), *events]:
        active = sorted(i for i in machine.running if not machine.jobs[i].waits)
        if kind == "submit":
            machine.submit(*rest[0])
        elif kind == "step" and active:
            machine.step(machine.jobs[active[rest[0] % len(active)]])
        elif kind == "all":
            for _, each in itertools.product(range(rest[0]), active):
                if each in machine.running and not machine.jobs[each].waits:
                    machine.step(machine.jobs[each])
        elif kind == "cancel" and machine.jobs:
            machine.end(
                sorted(machine.jobs.items())[rest[0] % len(machine.jobs)][1], cancelled=True
            )
        elif kind == "time":
            machine.now += rest[0]
        elif kind == "resize":
            try:
                scheduler.resize(int(budget * rest[0]))
                machine.budget = int(budget * rest[0])
            except InputError:
                continue
        machine.settle_all()
    machine.drain()
    assert machine.done == machine.submitted
    assert scheduler.state().running == scheduler.state().waiting == scheduler.bytes_held() == 0
