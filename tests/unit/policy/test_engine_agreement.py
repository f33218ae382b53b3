"""The timeline's rules are those of the transfer engine: the same units at the same moments."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_blocks import make_machine

from lib.policy import TimedUse, Timeline, Transfer, simulate
from lib.tiering.transfer.prefetch import Prefetcher
from lib.tiering.transfer.transport import Ticket, Unit
from lib.vocabulary import Tier

TIERS = make_machine().tiers
PASSES = 6


class TimelineLink:
    """A link that moves nothing and lets the time of a timeline pass."""

    def __init__(self) -> None:
        self.timeline = Timeline(TIERS)

    def submit(self, unit: Unit, slot: int) -> Ticket:
        ticket = Ticket(unit, slot)
        ticket.due = self.timeline.request(unit.tier, unit.num_bytes)
        ticket.arrived.set()
        return ticket

    def wait(self, ticket: Ticket) -> None:
        self.timeline.wait(ticket.due)

    def done_with(self, slot: int, *, shared: bool) -> bool:
        return True


blocks = st.tuples(
    st.sampled_from([Tier.CPU, Tier.SSD]),
    st.lists(st.integers(1, 9_000_000), min_size=1, max_size=3),
    st.sampled_from([0.0, 1e-3, 1e-2]),
)


@settings(deadline=None, max_examples=50)
@given(st.lists(blocks, min_size=1, max_size=6), st.integers(1, 3), st.floats(0, 0.02))
def test_a_predicted_pass_is_what_the_engine_does(
    model: list[tuple[Tier, list[int], float]], num_slots: int, resident_seconds: float
) -> None:
    uses = [TimedUse(str(index), seconds) for index, (_, _, seconds) in enumerate(model)]
    transfers = {str(i): Transfer(tier, tuple(sizes)) for i, (tier, sizes, _) in enumerate(model)}
    units = {
        name: [
            Unit(name, index, transfer.tier, name, 0, size, size)
            for index, size in enumerate(transfer.unit_bytes)
        ]
        for name, transfer in transfers.items()
    }
    link = TimelineLink()
    engine = Prefetcher(link, num_slots, [unit for use in uses for unit in units[use.block]])  # type: ignore[arg-type]
    start = 0.0
    for _ in range(PASSES):
        start = link.timeline.now
        engine.begin_forward()
        for use in uses:
            total = sum(unit.num_bytes for unit in units[use.block])
            for unit in units[use.block]:
                engine.acquire(unit)
                link.timeline.compute(use.compute_seconds * unit.num_bytes / total)
                engine.release(unit, shared=False)
        link.timeline.compute(resident_seconds)
        engine.end_forward()
    predicted = simulate(
        [*uses, TimedUse("resident", resident_seconds)], transfers, TIERS, num_slots, PASSES
    )
    assert link.timeline.now - start == pytest.approx(predicted.seconds, abs=1e-9)
