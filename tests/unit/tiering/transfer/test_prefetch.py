"""The transfer engine against a link that only remembers: what is asked for, and when."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lib.errors import PlacementError
from lib.tiering.transfer.prefetch import Prefetcher
from lib.tiering.transfer.transport import Ticket, Unit
from lib.vocabulary import Tier


class RememberedLink:
    """Delivers at once and keeps the order; knows which unit each slot holds."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.slots: dict[int, Unit] = {}
        self.failing: set[str] = set()
        self.tickets: dict[str, Ticket] = {}

    def submit(self, unit: Unit, slot: int) -> Ticket:
        self.asked.append(unit.group)
        self.slots[slot] = unit
        ticket = self.tickets[unit.group] = Ticket(unit, slot)
        ticket.arrived.set()
        return ticket

    def wait(self, ticket: Ticket) -> Tensor | None:
        assert self.slots[ticket.slot] is ticket.unit, "the slot was given to another unit"
        if ticket.error is not None:
            raise ticket.error
        if ticket.unit.group in self.failing:
            raise PlacementError(f"{ticket.unit.group} is damaged")
        return None

    def done_with(self, slot: int, *, shared: bool) -> bool:
        return True

    def is_lent(self, slot: int) -> bool:
        return False


def unit(name: str) -> Unit:
    return Unit(name, 0, Tier.SSD, name, 0, 4096, 4096)


def run(prefetcher: Prefetcher, order: str) -> None:
    prefetcher.begin_forward()
    for name in order:
        prefetcher.acquire(unit(name))
        prefetcher.release(unit(name), shared=False)
    prefetcher.end_forward()


def make(num_slots: int, schedule: str) -> tuple[Prefetcher, RememberedLink]:
    link = RememberedLink()
    return Prefetcher(link, num_slots, [unit(name) for name in schedule]), link  # type: ignore[arg-type]


@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_in_a_cycle_each_unit_is_read_once_a_pass_in_order(num_slots: int) -> None:
    prefetcher, link = make(num_slots, "abcdef")
    for _ in range(3):
        run(prefetcher, "abcdef")
    assert "".join(link.asked).startswith("abcdef" * 3)
    assert len(link.asked) <= 3 * 6 + num_slots  # what comes first in the next pass is asked for


def test_the_next_unit_is_asked_for_before_the_present_one_is_used() -> None:
    prefetcher, link = make(2, "abcd")
    prefetcher.begin_forward()
    prefetcher.acquire(unit("a"))
    assert link.asked == ["a", "b"]
    prefetcher.release(unit("a"), shared=False)
    assert link.asked == ["a", "b", "c"]


def test_units_that_fit_the_slots_together_are_read_once() -> None:
    prefetcher, link = make(3, "ab")
    for _ in range(4):
        run(prefetcher, "abab")
    assert link.asked == ["a", "b"]


def test_the_order_of_the_first_pass_is_expected_in_the_second() -> None:
    prefetcher, link = make(2, "abcd")
    run(prefetcher, "dbca")
    link.asked.clear()
    run(prefetcher, "dbca")
    assert len(link.asked) <= 4 + 1


def test_a_skipped_unit_costs_one_transfer_at_most() -> None:
    prefetcher, link = make(2, "abcdef")
    run(prefetcher, "abcdef")
    link.asked.clear()
    run(prefetcher, "abdef")
    assert link.asked.count("d") == 1
    assert len(link.asked) <= 6 + 2


def test_all_slots_held_is_a_clear_error() -> None:
    prefetcher, _ = make(2, "abc")
    prefetcher.acquire(unit("a"))
    prefetcher.acquire(unit("b"))
    with pytest.raises(PlacementError, match="c: all 2 slots are held.*larger HBM budget"):
        prefetcher.acquire(unit("c"))
    prefetcher.release(unit("a"), shared=False)
    prefetcher.acquire(unit("c"))


def test_a_failed_transfer_raises_and_is_tried_again_next_time() -> None:
    prefetcher, link = make(2, "abc")
    link.failing = {"b"}
    prefetcher.acquire(unit("a"))
    prefetcher.release(unit("a"), shared=False)
    with pytest.raises(PlacementError, match="b is damaged"):
        prefetcher.acquire(unit("b"))
    link.failing = set()
    prefetcher.acquire(unit("b"))
    prefetcher.release(unit("b"), shared=False)
    assert link.asked.count("b") == 2


def test_what_failed_when_it_was_read_ahead_does_not_fail_the_next_forward() -> None:
    prefetcher, link = make(3, "abc")
    prefetcher.acquire(unit("a"))
    assert link.asked == ["a", "b", "c"]
    link.tickets["c"].error = PlacementError("c was damaged")
    prefetcher.end_holds()
    prefetcher.forget_failed()
    prefetcher.begin_forward()
    prefetcher.acquire(unit("c"))
    assert link.asked.count("b") == 1
    assert link.asked.count("c") == 2


@given(
    num_slots=st.integers(1, 4),
    schedule=st.text("abcdef", max_size=8),
    passes=st.lists(st.text("abcdefg", max_size=10), max_size=5),
)
def test_whatever_the_order_each_use_finds_its_own_bytes(
    num_slots: int, schedule: str, passes: list[str]
) -> None:
    prefetcher, link = make(num_slots, schedule)
    for order in passes:
        run(prefetcher, order)  # the link asserts that slots are never given away too early
    assert len(set(link.slots)) <= num_slots
    prefetcher.drain()


def test_uses_between_forwards_are_not_kept() -> None:
    prefetcher, _ = make(2, "abc")
    for _ in range(2):
        run(prefetcher, "abc")
        for _ in range(500):
            prefetcher.acquire(unit("c"))
            prefetcher.release(unit("c"), shared=True)
        assert not prefetcher._trace
    assert prefetcher._schedule == [unit(name) for name in "abc"]


def test_uses_after_an_interrupted_forward_are_not_kept() -> None:
    prefetcher, _ = make(2, "abc")
    prefetcher.begin_forward()
    prefetcher.acquire(unit("a"))
    prefetcher.end_holds()
    for _ in range(500):
        prefetcher.acquire(unit("c"))
        prefetcher.release(unit("c"), shared=True)
    assert len(prefetcher._trace) == 1
