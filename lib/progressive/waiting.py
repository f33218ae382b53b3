"""Requests without memory, and what an engine counts of all."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .active import Active
from .bounds import Kind, kind_of, quality_of
from .generation import Event, Finish, GenerationRequest, Outcome
from .measuring import OnMeasured


@dataclass(slots=True, kw_only=True)
class EngineStats:
    """What an engine did, and holds."""

    waiting: int = 0
    running: int = 0
    most_running: int = 0
    steps: int = 0
    running_steps: int = 0
    """Sum over steps of the requests that went on, not of those that had memory and waited for
    more: by steps, the mean concurrency.
    """
    adopted_tokens: int = 0
    """Of prompts, that earlier requests had computed."""
    new_tokens: int = 0
    rejected_tokens: int = 0
    escalations: int = 0
    step_downs: int = 0
    """Of verified requests to their lowest tier, for the sake of others."""
    evictions: int = 0
    """Requests that gave all back for a lower budget, to be computed again."""
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    kv_budget: int = 0
    kv_bytes: int = 0
    """Of keys and values in fast memory now, the slot for originals included."""
    most_kv_bytes: int = 0
    tiers: dict[str, int] = field(default_factory=dict)
    """Tier -> requests that ended there."""
    audits: int = 0
    """Of answers under a calibrated bound."""
    broken_bounds: int = 0
    """Found by audits."""
    failed_audits: int = 0
    """Answers that were to be audited, and couldn't be measured."""
    stopped_bounds: int = 0
    """Deltas of which nothing is released below full any more."""

    def hold(self, num_bytes: int) -> None:
        """Take note of what keys and values take now."""
        self.kv_bytes = num_bytes
        self.most_kv_bytes = max(num_bytes, self.most_kv_bytes)

    def count(self, active: Active, tier: str) -> None:
        """Take note of a request that has ended at a tier."""
        if active.finish in (Finish.CANCELLED, Finish.DEADLINE):
            self.cancelled += 1
        else:
            self.finished += 1
        self.tiers[tier] = self.tiers.get(tier, 0) + 1
        self.new_tokens += active.num_new
        self.rejected_tokens += active.rejected


@dataclass(slots=True)
class Waiting:
    """A request that has no memory.

    ``tier``: the one that it is to have, where that is given; ``answer``: the one that it measures;
    ``before``: what it did until it was evicted.
    """

    number: int
    request: GenerationRequest
    on_event: Callable[[Event], None]
    tier: int | None = None
    on_measured: OnMeasured | None = None
    answer: Active | None = None
    before: Active | None = None

    def first_tier(self, full: int) -> int:
        """Return the tier that it starts at; ``full``: index of the full one."""
        if self.tier is not None:
            return self.tier
        if self.before is not None and self.before.kind is Kind.CALIBRATED:
            return self.before.tier if self.before.is_decided else 0  # as the scheduler has it
        return full if kind_of(self.request.bound) is Kind.FULL else 0


def tell(callback: Callable[[Any], None], what: Any) -> None:
    """Call what a caller gave: if it raises, that is the caller's affair, and others go on."""
    try:
        callback(what)
    except Exception as error:
        warnings.warn(f"a request's callback raised {error!r}", RuntimeWarning, stacklevel=2)


def unstarted(request: GenerationRequest, finish: Finish, tier: str) -> Outcome:
    """Return the outcome of a request that never ran."""
    return Outcome(
        finish=finish,
        prompt_tokens=len(request.prompt),
        new_tokens=0,
        rejected_tokens=0,
        quality=quality_of(request.bound, tier),
    )
