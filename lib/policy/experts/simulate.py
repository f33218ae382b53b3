"""Decoding on a clock: one link, one expert at a time, computing meanwhile.

A layer's call first reads what it lacks, in the order asked for, then computes. Reads of its own
come before reads ahead, which go by deadline; none is interrupted. A guess that has not begun when
its layer comes is read then if it was right, and given up if it was wrong. The cache that decides
is the engine's. Prompts prime it and take no time here.
"""

import heapq
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .cache import ExpertCache
from .residents import Expert
from .routing import Call
from .speculation import Speculation


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Seconds to read a byte, and what each read takes besides; seconds a layer computes."""

    seconds_per_byte: float
    setup_seconds: float = 0.0
    compute_seconds: float

    def read_seconds(self, num_bytes: int) -> float:
        """Return how long one read takes."""
        return self.setup_seconds + num_bytes * self.seconds_per_byte


@dataclass(slots=True, kw_only=True)
class Timed:
    """What decode steps took. Simulated, and so is every rate.

    ``resident`` uses needed no read since the last use, ``ready`` ones no wait either way.
    ``bytes_read`` includes ``bytes_wasted``, read ahead and not used.
    """

    tokens: int = 0
    uses: int = 0
    resident: int = 0
    ready: int = 0
    bytes_read: int = 0
    bytes_wasted: int = 0
    stall_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def resident_hit(self) -> float:
        """Share of uses without a read."""
        return self.resident / self.uses

    @property
    def ready_hit(self) -> float:
        """Share of uses without a wait."""
        return self.ready / self.uses

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens by all seconds."""
        return self.tokens / self.seconds


Guesses = Mapping[int, Sequence[tuple[int, Sequence[int]]]]
"""By the place of a call: later places, and the experts that are expected to be used there."""


def make_guesses(calls: Sequence[Call], *, ahead: int, recall: float, seed: int = 0) -> Guesses:
    """Return guesses as a predictor of that recall makes them, so many layers ahead.

    Each expert of a later call is named with that probability, else another of the experts its
    layer has in the recording, so that wrong ones cost reads. Steps begin unpredicted: no guess
    goes from one token to the next. Raises nothing.
    """
    draw = random.Random(seed)
    seen: dict[int, dict[int, None]] = {}
    for call in calls:
        seen.setdefault(call.layer, {}).update(
            dict.fromkeys(index for experts in call.tokens for index in experts)
        )
    pools = {layer: list(experts) for layer, experts in seen.items()}
    guesses: dict[int, list[tuple[int, Sequence[int]]]] = {}
    for place, call in enumerate(calls):
        if not call.decode:
            continue
        for later in range(place + 1, min(place + ahead, len(calls) - 1) + 1):
            target = calls[later]
            if not target.decode or target.layer <= calls[later - 1].layer:
                break
            named: dict[int, None] = {}
            for index in target.tokens[0]:
                named[index if draw.random() < recall else draw.choice(pools[target.layer])] = None
            guesses.setdefault(place, []).append((later, tuple(named)))
    return guesses


def simulate_decode(
    calls: Sequence[Call],
    cache: ExpertCache,
    machine: Machine,
    *,
    guesses: Guesses | None = None,
    per_layer: int = 2,
    switch: bool = True,
) -> Timed:
    """Send calls through a cache on a machine; returns what the decode steps took.

    ``guesses`` are read ahead, only what is missing, at most ``per_layer`` of a later call each
    time; with ``switch`` only while that pays. Without them experts are read on demand.
    """
    return _Decoding(cache, machine, guesses or {}, per_layer, switch).run(calls)


class _Decoding:
    """The clock, the link and what is on its way."""

    def __init__(
        self, cache: ExpertCache, machine: Machine, guesses: Guesses, per_layer: int, switch: bool
    ) -> None:
        self._cache = cache
        self._machine = machine
        self._guesses = guesses
        self._per_layer = per_layer
        self._speculation = Speculation() if switch else None
        self._now = 0.0
        self._link_free = 0.0
        self._queue: list[tuple[int, int, Expert, float]] = []  # deadline, order, what, since
        self._waiting: dict[Expert, int] = {}  # queued: its order
        self._arriving: dict[Expert, float] = {}  # begun, and not used yet: when it is there
        self._victims: dict[Expert, tuple[Expert, ...]] = {}  # by guess: what went for it
        self._taken: dict[Expert, None] = {}  # what went for wrong guesses
        self._order = 0
        self._timed = Timed()

    def run(self, calls: Sequence[Call]) -> Timed:
        """Return what all calls took."""
        timed = self._timed
        first = min((call.layer for call in calls if call.decode), default=0)
        for place, call in enumerate(calls):
            if not call.decode:
                self._cache.use_many(call.layer, call.tokens)
                continue
            timed.tokens += call.layer == first
            self._begin_reads()
            self._serve(call)
            self._guess(place, calls)
            self._now += self._machine.compute_seconds
        timed.bytes_wasted += sum(map(self._size, self._arriving))
        timed.seconds = self._now
        return timed

    def _serve(self, call: Call) -> None:
        """Read what a call lacks, and wait for it."""
        timed, start = self._timed, self._now
        layer, experts = call.layer, call.tokens[0]
        mine = [expert for expert in self._waiting if expert[0] == layer]
        for expert in mine:  # not begun: no read ahead any more
            del self._waiting[expert]
            self._victims.pop(expert, None)
            self._cache.forget(*expert)
        busy = max(0.0, self._link_free - start)
        loading = [expert for expert in self._arriving if self._arriving[expert] == self._link_free]
        admission = self._cache.use(layer, experts)
        self._drop(admission.evicted)
        missing = (*admission.misses, *admission.passing)
        if missing and busy and not any(expert[0] == layer for expert in loading):
            self._lose(busy)
        for index in missing:
            if self._taken.pop((layer, index), 0) is None:
                self._lose(self._machine.read_seconds(self._size((layer, index))))
        until = start
        timed.uses += len(experts)
        for index in admission.hits:
            expert = (layer, index)
            self._victims.pop(expert, None)  # a demand would have taken their room as well
            there = self._arriving.pop(expert, None)
            if there is None:
                timed.resident += 1
                timed.ready += 1
                continue
            timed.ready += there <= start
            wait = max(0.0, there - start)
            self._gain(max(0.0, self._machine.read_seconds(self._size(expert)) - wait))
            until = max(until, there)
        for index in missing:
            until = max(until, self._read((layer, index), start))
        for expert in [expert for expert in self._arriving if expert[0] == layer]:
            del self._arriving[expert]  # guessed and not used
            self._taken |= dict.fromkeys(self._victims.pop(expert, ()))
            timed.bytes_wasted += self._size(expert)
        timed.stall_seconds += until - start
        self._now = until

    def _guess(self, place: int, calls: Sequence[Call]) -> None:
        """Queue what is expected and missing."""
        for later, experts in self._guesses.get(place, ()):
            layer = calls[later].layer
            lacking = [index for index in experts if (layer, index) not in self._cache]
            for index in lacking[: self._per_layer]:
                if self._speculation is not None and not self._speculation.wants():
                    continue
                evicted = self._cache.admit_predicted(layer, index)
                if evicted is None:
                    continue
                self._drop(evicted)
                self._victims[layer, index] = evicted
                self._order += 1
                self._waiting[layer, index] = self._order
                heapq.heappush(self._queue, (later, self._order, (layer, index), self._now))

    def _begin_reads(self) -> None:
        """Begin what is queued, while the link is free before now."""
        while self._queue and self._link_free < self._now:
            _, order, expert, since = heapq.heappop(self._queue)
            if self._waiting.get(expert) == order:
                del self._waiting[expert]
                self._arriving[expert] = self._read(expert, since)

    def _read(self, expert: Expert, since: float) -> float:
        """Read an expert from then on, when the link is free; returns when it is there."""
        size = self._size(expert)
        self._link_free = max(self._link_free, since) + self._machine.read_seconds(size)
        self._timed.bytes_read += size
        return self._link_free

    def _drop(self, evicted: Sequence[Expert]) -> None:
        for expert in evicted:
            self._waiting.pop(expert, None)
            self._victims.pop(expert, None)
            if self._arriving.pop(expert, None) is not None:
                self._timed.bytes_wasted += self._size(expert)

    def _size(self, expert: Expert) -> int:
        return self._cache.sizes[expert[0]][expert[1]]

    def _gain(self, seconds: float) -> None:
        if self._speculation is not None:
            self._speculation.gain(seconds)

    def _lose(self, seconds: float) -> None:
        if self._speculation is not None:
            self._speculation.lose(seconds)
