"""What would have happened: a log's observations under another policy, budget or machine.

It is simulated. The observations that come from outside (what is asked for, hints of the system,
time) are those of the log; what was carried out is not: each decision is, at once. Time per pass is
what the planner's timeline makes of it (``timeline.simulate``); lookups are left out.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..machine import TierSpec
from ..vocabulary import Tier
from .control import Controller, Settings
from .events import Asked, BlockFacts, Decision, Facts, Held, MemoryHint, Move, Observation, Tick
from .replay import Run
from .timeline import PassTime, TimedUse, Transfer, simulate

POLICIES: Mapping[str, Mapping[str, int]] = {
    "ours": {},
    "eager": {"dwell_us": 0, "refill_us": 1},
    "never-grow": {"dwell_us": 2**62},
}
"""Name -> what it changes in the settings of the log."""
_TICK_US = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A time in which nothing moved. ``predicted``: one pass in it."""

    from_us: int
    until_us: int
    limit_bytes: int | None
    fast_bytes: int
    predicted: PassTime


@dataclass(frozen=True, slots=True, kw_only=True)
class Supposed:
    """What would have happened in a run; ``transitions``: by block, only of those that moved."""

    phases: list[Phase]
    transitions: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """Return it as a document; the mean is over time."""
        seconds = [(phase.until_us - phase.from_us) * 1e-6 for phase in self.phases]
        total = sum(seconds)
        passes = sum(
            each / phase.predicted.seconds
            for each, phase in zip(seconds, self.phases, strict=True)
            if phase.predicted.seconds
        )
        return {
            "simulated": True,
            "seconds": total,
            "passes": passes,
            "tokens_per_s": passes / total if total else None,
            "transitions": sum(self.transitions.values()),
            "transitions_per_block_max": max(self.transitions.values(), default=0),
            "phases": [
                {
                    "from_s": phase.from_us * 1e-6,
                    "until_s": phase.until_us * 1e-6,
                    "limit_bytes": phase.limit_bytes,
                    "fast_bytes": phase.fast_bytes,
                    "ms_per_token": phase.predicted.seconds * 1e3,
                    "moved_bytes": phase.predicted.moved_bytes,
                }
                for phase in self.phases
            ],
        }


def suppose(
    run: Run,
    *,
    policy: str = "ours",
    limit_bytes: int | None = None,
    tiers: Mapping[Tier, TierSpec] | None = None,
) -> Supposed:
    """Play a run again under a policy, with every smaller budget that was asked for replaced by
    ``limit_bytes``, on a machine with these tiers.
    """
    settings = replace(run.settings, **POLICIES[policy])
    return _Play(run, settings, limit_bytes, tiers or run.tiers).play()


class _Play:
    """One simulation."""

    def __init__(
        self,
        run: Run,
        settings: Settings,
        limit_bytes: int | None,
        specs: Mapping[Tier, TierSpec],
    ) -> None:
        self._run = run
        self._controller = Controller(settings)
        self._limit_bytes = limit_bytes
        self._specs = specs
        self._phases: list[Phase] = []
        self._transitions: dict[str, int] = {}
        self._last: PassTime | None = None

    def play(self) -> Supposed:
        for event in self._outside():
            decision = self._observe(event)
            if decision is None:
                continue
            self._end_phase(event.time_us)
            self._carry_out(decision, event.time_us)
        if self._run.entries:
            self._end_phase(self._run.entries[-1].observation.time_us)
        return Supposed(phases=self._phases, transitions=self._transitions)

    def _outside(self) -> Iterator[Observation]:
        """Yield what comes from outside, and the ticks of the time between."""
        held, now = False, 0
        for entry in self._run.entries:
            event = entry.observation
            while held and now + _TICK_US < event.time_us:
                now += _TICK_US
                yield Tick(sequence=0, time_us=now, waited_share=1.0)
            now = max(now, event.time_us)
            if isinstance(event, Held):
                if held:
                    continue
                held = True
            if isinstance(event, Facts):
                event = replace(event, blocks=tuple(map(self._on_machine, event.blocks)))
            if isinstance(event, Asked) and self._limit_bytes is not None:
                if event.limit_bytes is not None and event.limit_bytes < self._limit_bytes:
                    event = replace(event, limit_bytes=self._limit_bytes)
            if isinstance(event, Facts | Held | Asked | MemoryHint | Tick):
                yield replace(event, time_us=now)

    def _on_machine(self, facts: BlockFacts) -> BlockFacts:
        """Return a block with the seconds of its transfers on this machine's slowest link."""
        specs = [spec for tier, spec in self._specs.items() if tier is not Tier.HBM]
        slowest = min(specs, key=lambda spec: spec.bandwidth_gb_s)
        seconds = sum(map(slowest.transfer_seconds, facts.unit_bytes)) * len(facts.places)
        return replace(facts, transfer_seconds=seconds)

    def _observe(self, event: Observation) -> Decision | None:
        controller = self._controller
        return controller.observe(replace(event, sequence=controller.sequence + 1))

    def _carry_out(self, decision: Decision, time_us: int) -> None:
        """Do what a decision says; what only the planner could do isn't simulated."""
        if not isinstance(decision, Move):
            return
        tiers = dict(self._controller.holding.tiers)
        for name, tier in (*decision.demote, *((name, Tier.HBM) for name in decision.promote)):
            tiers[name] = tier
            self._transitions[name] = self._transitions.get(name, 0) + 1
        self._observe(
            Held(
                sequence=0,
                time_us=time_us,
                tiers=tuple(tiers.values()),
                num_slots=decision.num_slots,
                slot_bytes=decision.slot_bytes,
                limit_bytes=decision.limit_bytes,
                decided=True,
            )
        )
        self._last = None

    def _end_phase(self, until_us: int) -> None:
        start = self._phases[-1].until_us if self._phases else 0
        if until_us <= start:
            return
        holding = self._controller.holding
        if self._last is None:
            self._last = predict_pass(
                list(holding.blocks.values()), holding.tiers, holding.num_slots, self._specs
            )
        self._phases.append(
            Phase(
                from_us=start,
                until_us=until_us,
                limit_bytes=self._controller.limit_bytes,
                fast_bytes=holding.fast_bytes,
                predicted=self._last,
            )
        )


def predict_pass(
    blocks: list[BlockFacts],
    tiers: Mapping[str, Tier],
    num_slots: int,
    specs: Mapping[Tier, TierSpec],
) -> PassTime:
    """Return what a pass takes with blocks in these tiers; lookups are left out."""
    uses = sorted((place, facts) for facts in blocks for place in facts.places)
    transfers = {
        facts.name: Transfer(tiers[facts.name], facts.unit_bytes)
        for facts in blocks
        if tiers[facts.name] is not Tier.HBM and facts.places
    }
    timed = [TimedUse(facts.name, facts.compute_seconds) for _, facts in uses]
    return simulate(timed, transfers, specs, num_slots)
