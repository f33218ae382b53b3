"""When transfers should begin, and which goes first on a link.

    window of a block = setup + bytes / bandwidth + decode + margin * (setup + bytes / bandwidth)

before its use it has to be asked for. A link serves one transfer at a time. *Demand*, what compute
waits for now, goes first. *Predicted* transfers follow in the order of their latest beginnings.
*Background* ones (promotions for good, which make later passes faster) get what is left, and only
begin where they end before the next predicted one has to begin: its bandwidth is reserved.
Predicted and background transfers that have not begun can be cancelled, and a demand for what is
queued takes its place.

Predicting switches itself off where it has not paid: ``Gain`` compares the seconds that arrivals in
time have saved with those for which useless reads have kept the link from others.

Pure: times are seconds on the caller's clock.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum

from ..machine import TierSpec
from ..vocabulary import Tier

MARGIN = 0.25
"""The share of a transfer's time by which it is begun earlier: links jitter."""


class Urgency(IntEnum):
    """Why something is moved; the smallest goes first."""

    DEMAND = 0
    PREDICTED = 1
    BACKGROUND = 2


def window_seconds(
    spec: TierSpec, num_bytes: int, *, decode_seconds: float = 0.0, margin: float = MARGIN
) -> float:
    """Return how long before its use a transfer should be asked for, on a link that is free."""
    return spec.transfer_seconds(num_bytes) * (1 + margin) + decode_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A transfer that is asked for. ``needed_at``: when its bytes are used; None: not known."""

    block: str
    tier: Tier
    num_bytes: int
    urgency: Urgency
    needed_at: float | None = None
    decode_seconds: float = 0.0


class Schedule:
    """The transfers that wait for their links, one job for each block."""

    def __init__(self, tiers: Mapping[Tier, TierSpec], *, margin: float = MARGIN) -> None:
        self._tiers = tiers
        self._margin = margin
        self._jobs: dict[str, tuple[int, Job]] = {}
        self._count = 0

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, block: object) -> bool:
        return block in self._jobs

    def ask(self, job: Job) -> None:
        """Queue a transfer; one of the same block that waits is replaced where this is as urgent or
        more, and stays otherwise.
        """
        waiting = self._jobs.get(job.block)
        if waiting is not None and waiting[1].urgency < job.urgency:
            return
        self._count += 1
        self._jobs[job.block] = self._count, job

    def cancel(self, block: str) -> bool:
        """Take a transfer out of the queue; returns whether there was one. A demand stays."""
        waiting = self._jobs.get(block)
        if waiting is None or waiting[1].urgency is Urgency.DEMAND:
            return False
        del self._jobs[block]
        return True

    def cancel_all(self, urgency: Urgency) -> list[str]:
        """Take all transfers of one kind out of the queue; returns their blocks."""
        blocks = [block for block, (_, job) in self._jobs.items() if job.urgency is urgency]
        return [block for block in blocks if self.cancel(block)]

    def latest_start(self, job: Job) -> float:
        """Return when a job has to begin to be there in time; infinite where no time is set."""
        if job.needed_at is None:
            return float("inf")
        return job.needed_at - window_seconds(
            self._tiers[job.tier],
            job.num_bytes,
            decode_seconds=job.decode_seconds,
            margin=self._margin,
        )

    def take(self, tier: Tier, now: float) -> Job | None:
        """Return what a link that is free begins with now, and take it out of the queue; None: it
        rests, since nothing waits, or what waits would be in the way of what has to come.
        """
        waiting = [entry for entry in self._jobs.values() if entry[1].tier is tier]
        ranked = sorted(
            waiting, key=lambda entry: (entry[1].urgency, self.latest_start(entry[1]), entry[0])
        )
        for _, job in ranked:
            if job.urgency is not Urgency.BACKGROUND or self._has_time(job, ranked, now):
                del self._jobs[job.block]
                return job
        return None

    def _has_time(self, job: Job, ranked: list[tuple[int, Job]], now: float) -> bool:
        """Say whether a background job ends before a predicted one has to begin."""
        ends = now + self._tiers[job.tier].transfer_seconds(job.num_bytes)
        return all(
            self.latest_start(other) >= ends
            for _, other in ranked
            if other.urgency is not Urgency.BACKGROUND
        )


@dataclass(slots=True, kw_only=True)
class Gain:
    """Whether predicting pays: what it has saved and cost, of which the past counts less and less.

    It is off while the balance of the last ``memory`` predictions or so is not positive, once there
    were ``trial`` of them; after ``retry`` uses without any it is tried again.
    """

    memory: int = 64
    trial: int = 16
    retry: int = 256
    saved_seconds: float = 0.0
    lost_seconds: float = 0.0
    count: int = 0
    _idle: int = field(default=0)

    @property
    def pays(self) -> bool:
        """Predict, or don't."""
        return self.count < self.trial or self.saved_seconds > self.lost_seconds

    def used(self, seconds: float) -> None:
        """Hear of an arrival that was used: of the seconds that compute needn't wait for it."""
        self._add(seconds, 0.0)

    def wasted(self, seconds: float) -> None:
        """Hear of one that was not used: of the seconds for which others had to wait behind it."""
        self._add(0.0, seconds)

    def passed(self) -> None:
        """Hear of a use for which nothing was predicted, since it does not pay."""
        self._idle += 1
        if self._idle >= self.retry:
            self.count = self._idle = 0
            self.saved_seconds = self.lost_seconds = 0.0

    def _add(self, saved: float, lost: float) -> None:
        keep = 1 - 1 / self.memory
        self.saved_seconds = keep * self.saved_seconds + saved
        self.lost_seconds = keep * self.lost_seconds + lost
        self.count += 1
