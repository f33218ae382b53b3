"""Blocks for the controller, and a machine that carries out what it decides."""

from collections.abc import Sequence

from lib.policy.control import Controller, Settings
from lib.policy.events import (
    Asked,
    BlockFacts,
    Decision,
    Facts,
    Failed,
    Held,
    MemoryHint,
    Move,
    Observation,
    Tick,
)
from lib.vocabulary import Tier


def toy_facts(sizes: Sequence[int], *, pinned: int = 0) -> tuple[BlockFacts, ...]:
    """Return blocks of these sizes, used in this order; the first ``pinned`` may not leave."""
    return tuple(
        BlockFacts(
            name=f"b{index}",
            resident_bytes=size,
            stored_bytes=size,
            unit_bytes=(size,),
            must_reside=index < pinned,
            places=(index,),
            transfer_seconds=1e-4 + size * 1e-6,
            compute_seconds=1e-3,
            importance=1.0,
        )
        for index, size in enumerate(sizes)
    )


def floor_of(blocks: Sequence[BlockFacts]) -> int:
    """Return the smallest budget: what is pinned, and a slot for the largest of the others."""
    pinned = sum(block.resident_bytes for block in blocks if block.must_reside)
    return pinned + max((b.slot_bytes for b in blocks if not b.must_reside), default=0)


class Machine:
    """Carries decisions out at once, and checks that they may be."""

    def __init__(self, blocks: Sequence[BlockFacts], settings: Settings) -> None:
        self.controller = Controller(settings)
        self.blocks = tuple(blocks)
        self.tiers = dict.fromkeys((block.name for block in blocks), Tier.HBM)
        self.limit: int | None = None
        self.num_slots, self.slot_bytes = 0, 0
        self.events: list[Observation] = []
        self.decisions: list[Decision] = []
        self.moves: list[tuple[int, str, bool]] = []
        """(Time, block, whether it came), in order."""
        self.shrunk_us: int | None = None
        self.time_us = 0
        self.tell(
            Facts,
            blocks=self.blocks,
            floor_bytes=floor_of(blocks),
            scratch_bytes=0,
            below=((Tier.SSD, None),),
        )
        self.hold(decided=False)

    def tell(self, kind: type[Observation], **values: object) -> Decision | None:
        observation = kind(sequence=self.controller.sequence + 1, time_us=self.time_us, **values)
        self.events.append(observation)
        decision = self.controller.observe(observation)
        if decision is not None:
            self.decisions.append(decision)
        return decision

    def hold(self, *, decided: bool) -> None:
        assert self.fast_bytes <= (self.limit if self.limit is not None else 2**62)
        self.tell(
            Held,
            tiers=tuple(self.tiers.values()),
            num_slots=self.num_slots,
            slot_bytes=self.slot_bytes,
            limit_bytes=self.limit,
            decided=decided,
        )

    @property
    def fast_bytes(self) -> int:
        resident = sum(
            block.resident_bytes for block in self.blocks if self.tiers[block.name] is Tier.HBM
        )
        return resident + self.num_slots * self.slot_bytes

    def step(self, kind: type[Observation], *, fails: bool = False, **values: object) -> None:
        """Let something be observed, and carry out what is decided."""
        decision = self.tell(kind, **values)
        if decision is None or not isinstance(decision, Move):
            return
        if fails:
            self.tell(Failed, reason="the disk is full")
            return
        before = self.fast_bytes
        by_name = {block.name: block for block in self.blocks}
        for name, tier in decision.demote:
            assert self.tiers[name] is Tier.HBM
            assert not by_name[name].must_reside
            self.tiers[name] = tier
            self.moves.append((self.time_us, name, False))
        for name in decision.promote:
            assert self.tiers[name] is not Tier.HBM
            self.tiers[name] = Tier.HBM
            self.moves.append((self.time_us, name, True))
        self.num_slots, self.slot_bytes = decision.num_slots, decision.slot_bytes
        away = [block for block in self.blocks if self.tiers[block.name] is not Tier.HBM]
        assert all(block.slot_bytes <= self.slot_bytes for block in away)
        if decision.promote:
            assert self.shrunk_us is None or self.time_us >= (
                self.shrunk_us + self.controller.settings.dwell_us
            )
        self.limit = decision.limit_bytes
        if decision.demote or self.fast_bytes < before:
            self.shrunk_us = self.time_us
        self.hold(decided=True)

    def ask(self, limit: int | None, *, fails: bool = False) -> None:
        self.step(Asked, limit_bytes=limit, fails=fails)

    def tick(self, after_us: int = 0) -> None:
        self.time_us += after_us
        self.step(Tick, waited_share=0.5)

    def hint(self, missing: int) -> None:
        self.step(MemoryHint, missing_bytes=missing)
