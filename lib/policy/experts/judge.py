"""Policies side by side on one recording: hit rates of decode steps, prompts having primed them.

Experts count one each, as slots do that fit any of them; bytes are those of the experts missed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import InputError
from .bounds import belady_misses
from .cache import POLICIES, Counters, ExpertCache
from .residents import Expert
from .routing import Call, Trace

_FIRST_STEPS = 10
"""One in so many decode steps makes the popularity of a recording without a prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One share of a recording's experts held: uses, and misses by policy and of the bound.

    ``bytes_missed`` are by the recording's sizes.
    """

    share: float
    slots: int
    below_cycle: bool
    uses: int
    misses: dict[str, int]
    bytes_missed: dict[str, int]
    belady_misses: int

    def hit_rate(self, policy: str) -> float:
        """Return the share of uses that needed no read; ``belady`` is a policy here too."""
        misses = self.belady_misses if policy == "belady" else self.misses[policy]
        return 1 - misses / self.uses

    @property
    def closed(self) -> float | None:
        """How much of the way from LRU to Belady ``ours`` goes; None where there is none."""
        gap = self.misses["lru"] - self.belady_misses
        return (self.misses["lru"] - self.misses["ours"]) / gap if gap else None

    @property
    def times_belady(self) -> float | None:
        """Reads of ``ours`` by Belady's; None where it has none."""
        return self.misses["ours"] / self.belady_misses if self.belady_misses else None


def judge(trace: Trace, share: float) -> Verdict:
    """Replay a recording with that share of all experts held; raises InputError for too few."""
    slots = slots_of(trace, share)
    calls = trace.calls()
    counted: dict[str, Counters] = {}
    missed_bytes = {}
    below = False
    for policy in POLICIES:
        cache = ExpertCache(
            {layer: [1] * count for layer, count in trace.experts.items()},
            slots,
            per_token=trace.per_token,
            policy=policy,
            counts=early_counts(calls) if policy == "popularity" else None,
            spare=policy == "ours",  # as in the engine
        )
        below = cache.below_cycle
        missed_bytes[policy] = sum(
            trace.expert_bytes[layer] * missed for layer, missed in replay(calls, cache)
        )
        counted[policy] = cache.counters
    return Verdict(
        share=share,
        slots=slots,
        below_cycle=below,
        uses=counted["ours"].hits + counted["ours"].misses,
        misses={policy: counters.misses for policy, counters in counted.items()},
        bytes_missed=missed_bytes,
        belady_misses=belady_misses(calls, slots),
    )


def slots_of(trace: Trace, share: float) -> int:
    """Return how many experts are that share of all; raises InputError for too few."""
    slots = int(share * trace.num_experts + 1e-9)
    smallest = max(trace.per_token.values())
    if slots < smallest:
        raise InputError(
            f"{share:g} of {trace.num_experts} experts is {slots}, and one layer needs {smallest} "
            f"at once: give {math.ceil(1e4 * smallest / trace.num_experts) / 1e4:g} or more"
        )
    return slots


def replay(calls: Sequence[Call], cache: ExpertCache) -> list[tuple[int, int]]:
    """Send calls through a cache; returns layer and misses of each decode step."""
    missed = []
    for call in calls:
        if call.decode:
            (experts,) = call.tokens
            missed.append((call.layer, len(cache.use(call.layer, experts).misses)))
        else:
            cache.use_many(call.layer, call.tokens)
    return missed


def early_counts(calls: Sequence[Call]) -> dict[Expert, float]:
    """Return the uses of each expert before the first decode step, so none of what is judged.

    A recording that starts with decode steps has those of its first tenth, which are judged too.
    """
    first = next((place for place, call in enumerate(calls) if call.decode), len(calls))
    early = calls[: first or max(1, len(calls) // _FIRST_STEPS)]
    counts: dict[Expert, float] = {}
    for call in early:
        for experts in call.tokens:
            for index in experts:
                counts[call.layer, index] = counts.get((call.layer, index), 0.0) + 1
    return counts
