"""Loads on an engine: as many requests as fit, Poisson arrivals, a given number at a time."""

import random
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lib.errors import InputError
from lib.progressive.engine import Engine
from lib.progressive.generation import Event, GenerationRequest, Outcome
from lib.progressive.waiting import EngineStats

_POLL_SECONDS = 0.002


@dataclass(slots=True)
class Answer:
    """What one request got, and when: seconds of time.perf_counter."""

    submitted: float
    times: list[tuple[float, int]] = field(default_factory=list)
    """Of each burst of tokens, and how many they were."""
    outcome: Outcome | None = None
    ended: float = 0.0
    done: threading.Event = field(default_factory=threading.Event)
    failure: Exception | None = None

    def __call__(self, event: Event) -> None:
        now = time.perf_counter()
        if isinstance(event, tuple):
            self.times.append((now, len(event)))
            return
        self.ended = now
        if isinstance(event, Outcome):
            self.outcome = event
        else:
            self.failure = event
        self.done.set()

    def result(self) -> Outcome:
        """Wait for the end; raises what went wrong."""
        self.done.wait()
        if self.failure is not None:
            raise self.failure
        assert self.outcome is not None
        return self.outcome

    @property
    def first_token_seconds(self) -> float:
        """From submission to the first token."""
        return self.times[0][0] - self.submitted

    @property
    def token_seconds(self) -> float:
        """Between tokens, on average: bursts count as what they are made of."""
        tokens = sum(count for _, count in self.times)
        return (self.times[-1][0] - self.times[0][0]) / max(1, tokens - self.times[0][1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Saturated:
    """A load of more requests than fit: from the end of the first, when it has filled up, as long
    as some wait.
    """

    answers: list[Answer]
    seconds: float
    tokens: list[int]
    """Of each request, released in that time."""
    concurrency: float
    """Mean over its steps."""
    stats: EngineStats
    """At its end."""


def saturate(
    engine: Engine, requests: Sequence[GenerationRequest], *, tier: int | None = None
) -> Saturated:
    """Submit all, and watch until none waits for memory any more: not how it fills up, when
    prompts alone are computed. Raises InputError where there is nothing to watch.
    """
    before = engine.stats().finished
    answers = submit(engine, requests, tier=tier)
    begin, first = time.perf_counter(), engine.stats()
    while (stats := engine.stats()).waiting:
        if first.finished == before:
            begin, first = time.perf_counter(), stats
        time.sleep(_POLL_SECONDS)
    end = time.perf_counter()
    if first.finished == before:
        raise InputError(f"none of {len(requests)} requests waits when the first ends: give more")
    for answer in answers:
        answer.result()
    return Saturated(
        answers=answers,
        seconds=end - begin,
        tokens=[sum(n for when, n in each.times if begin < when <= end) for each in answers],
        concurrency=(stats.running_steps - first.running_steps) / max(1, stats.steps - first.steps),
        stats=stats,
    )


def submit(
    engine: Engine, requests: Sequence[GenerationRequest], *, tier: int | None = None
) -> list[Answer]:
    """Submit all at once."""
    answers = [Answer(time.perf_counter()) for _ in requests]
    for request, answer in zip(requests, answers, strict=True):
        engine.submit(request, answer, tier=tier)
    return answers


def arrive(
    engine: Engine,
    requests: Sequence[GenerationRequest],
    *,
    rate: float,
    seed: int,
    tier: int | None = None,
) -> dict[str, float]:
    """Submit requests as a Poisson process of ``rate`` a second; return percentiles of seconds to
    the first token, and of seconds a token.
    """
    draw = random.Random(seed)
    answers = []
    due = time.perf_counter()
    for request in requests:
        due += draw.expovariate(rate)
        time.sleep(max(0.0, due - time.perf_counter()))
        answer = Answer(due)
        engine.submit(request, answer, tier=tier)
        answers.append(answer)
    for answer in answers:
        answer.result()
    first = [answer.first_token_seconds for answer in answers]
    between = [answer.token_seconds for answer in answers]
    return {
        "ttft_p50_s": statistics.median(first),
        "ttft_p95_s": percentile(first, 0.95),
        "tpot_p50_s": statistics.median(between),
        "tpot_p95_s": percentile(between, 0.95),
    }


def curve(
    make_engine: Any, requests: Sequence[GenerationRequest], counts: Sequence[int]
) -> list[dict[str, float]]:
    """Return tokens per second of full precision while so many requests are decoded together."""
    points = []
    for count in counts:
        with make_engine() as engine:
            answers = submit(engine, requests[:count])
            for answer in answers:
                answer.result()
        begin = max(answer.times[0][0] for answer in answers)
        end = min(answer.times[-1][0] for answer in answers)
        tokens = sum(n for answer in answers for when, n in answer.times if begin < when <= end)
        points.append({"concurrency": count, "tokens_per_s": tokens / (end - begin)})
    return points


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which a share of them lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
