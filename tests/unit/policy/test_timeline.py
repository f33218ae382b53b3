from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.machine import TierSpec
from lib.policy import TimedUse, Timeline, Transfer, simulate
from lib.vocabulary import Tier

SSD = {Tier.SSD: TierSpec("SSD", 0.0, 1.0), Tier.CPU: TierSpec("CPU", 0.0, 10.0)}
MB = 10**6  # a millisecond of the SSD's link


def test_a_resident_model_takes_its_compute_time() -> None:
    result = simulate([TimedUse("a", 0.25), TimedUse("b", 0.5)], {}, SSD, num_slots=0)
    assert result.seconds == result.compute_seconds == pytest.approx(0.75)
    assert result.wait_seconds == result.link_seconds == result.moved_bytes == 0


def test_setup_is_paid_for_each_transfer() -> None:
    tiers = {Tier.SSD: TierSpec("SSD", 500.0, 1.0)}
    result = simulate([TimedUse("a", 0.0)], {"a": Transfer(Tier.SSD, (MB, MB))}, tiers, 1)
    assert result.seconds == pytest.approx(3e-3)
    assert result.link_seconds == pytest.approx(3e-3)


def test_one_slot_reads_only_after_its_block_has_computed() -> None:
    uses = [TimedUse("a", 2e-3), TimedUse("b", 3e-3)]
    transfers = {name: Transfer(Tier.SSD, (4 * MB,)) for name in "ab"}
    result = simulate(uses, transfers, SSD, 1)
    assert result.seconds == pytest.approx(13e-3)
    assert result.wait_seconds == pytest.approx(8e-3)
    assert result.moved_bytes == 8 * MB


def test_two_slots_hide_compute_behind_the_link() -> None:
    uses = [TimedUse("a", 2e-3), TimedUse("b", 3e-3), TimedUse("c", 1e-3)]
    transfers = {name: Transfer(Tier.SSD, (4 * MB,)) for name in "abc"}
    result = simulate(uses, transfers, SSD, 2, passes=6)
    assert result.seconds == pytest.approx(12e-3)  # the link is never idle


def test_prefetch_wraps_around_the_end_of_a_pass() -> None:
    uses = [TimedUse("a", 0.0), TimedUse("b", 1e-3), TimedUse("resident", 20e-3)]
    transfers = {name: Transfer(Tier.SSD, (4 * MB,)) for name in "ab"}
    first = simulate(uses, transfers, SSD, 1, passes=1)
    steady = simulate(uses, transfers, SSD, 1)
    assert first.wait_seconds == pytest.approx(8e-3)
    assert steady.wait_seconds == pytest.approx(4e-3)  # a was read during the pass before


def test_a_unit_that_is_still_in_its_slot_is_not_read_again() -> None:
    transfers = {"a": Transfer(Tier.SSD, (4 * MB,))}
    assert simulate([TimedUse("a", 1e-3)] * 3, transfers, SSD, 1).moved_bytes == 0
    twice = [TimedUse("a", 0.0), TimedUse("a", 0.0), TimedUse("b", 0.0), TimedUse("c", 0.0)]
    transfers |= {name: Transfer(Tier.SSD, (MB,)) for name in "bc"}
    assert simulate(twice, transfers, SSD, 2).moved_bytes == 6 * MB


def test_tiers_have_links_of_their_own() -> None:
    uses = [TimedUse(name, 0.0) for name in "abcd"]
    transfers = {name: Transfer(Tier.SSD, (4 * MB,)) for name in "ac"}
    transfers |= {name: Transfer(Tier.CPU, (40 * MB,)) for name in "bd"}
    both = simulate(uses, transfers, SSD, 3, passes=9)
    assert both.link_seconds == pytest.approx(8e-3)  # of the busier one
    assert both.seconds == pytest.approx(8e-3)
    assert both.moved_bytes == 88 * MB


def test_a_block_in_shards_computes_shard_by_shard() -> None:
    whole = simulate([TimedUse("a", 8e-3)], {"a": Transfer(Tier.SSD, (8 * MB,))}, SSD, 1)
    assert whole.wait_seconds == 0  # it never leaves its slot
    shards = {"a": Transfer(Tier.SSD, (2 * MB,) * 4)}
    assert simulate([TimedUse("a", 8e-3)], shards, SSD, 1).seconds == pytest.approx(16e-3)
    assert simulate([TimedUse("a", 8e-3)], shards, SSD, 2).seconds == pytest.approx(8e-3)


def test_a_lookup_waits_behind_what_was_asked_for_before() -> None:
    uses = [TimedUse("embedding", 0.0, lookup=True), TimedUse("a", 0.0), TimedUse("b", 0.0)]
    transfers = {name: Transfer(Tier.SSD, (4 * MB,)) for name in "ab"}
    transfers["embedding"] = Transfer(Tier.SSD, (64 * MB,), lookup_bytes=MB)
    result = simulate(uses, transfers, SSD, 1)
    assert result.seconds == pytest.approx(9e-3)
    assert result.moved_bytes == 9 * MB
    only = simulate(uses[:1], {"embedding": transfers["embedding"]}, SSD, 0)
    assert only.seconds == pytest.approx(1e-3)


def test_the_clock_of_a_timeline_queues_transfers() -> None:
    timeline = Timeline(SSD)
    first, second = timeline.request(Tier.SSD, 2 * MB), timeline.request(Tier.SSD, MB)
    assert (first, second) == (pytest.approx(2e-3), pytest.approx(3e-3))
    timeline.compute(1e-3)
    timeline.wait(first)
    timeline.wait(first)
    assert timeline.now == pytest.approx(2e-3)
    assert timeline.wait_seconds == pytest.approx(1e-3)
    timeline.compute(5e-3)
    assert timeline.request(Tier.SSD, MB) == pytest.approx(8e-3)


block_lists = st.lists(
    st.tuples(
        st.sampled_from([Tier.CPU, Tier.SSD, None]),
        st.lists(st.integers(1, 9), min_size=1, max_size=3),
        st.sampled_from([0.0, 1e-3, 2e-2]),
    ),
    min_size=1,
    max_size=7,
)


@given(block_lists, st.integers(1, 3))
def test_a_pass_takes_at_least_its_compute_and_its_link(
    blocks: list[tuple[Tier | None, list[int], float]], num_slots: int
) -> None:
    names = [str(number) for number, _ in zip(count(), blocks, strict=False)]
    uses = [TimedUse(name, seconds) for name, (_, _, seconds) in zip(names, blocks, strict=True)]
    transfers = {
        name: Transfer(tier, tuple(size * MB for size in sizes))
        for name, (tier, sizes, _) in zip(names, blocks, strict=True)
        if tier is not None
    }
    result = simulate(uses, transfers, SSD, num_slots, passes=8)
    compute = sum(use.compute_seconds for use in uses)
    assert result.compute_seconds == pytest.approx(compute)
    assert result.seconds >= max(compute, result.link_seconds) * (1 - 1e-9)
    serial = sum(
        SSD[transfer.tier].transfer_seconds(size)
        for transfer in transfers.values()
        for size in transfer.unit_bytes
    )
    assert result.seconds <= (compute + serial) * (1 + 1e-9)
    deeper = simulate(uses, transfers, SSD, num_slots + 1, passes=8)
    assert deeper.seconds <= result.seconds * (1 + 1e-9)
    for name in transfers:
        fewer = {other: transfer for other, transfer in transfers.items() if other != name}
        resident = simulate(uses, fewer, SSD, num_slots, passes=8)
        assert resident.seconds <= result.seconds * (1 + 1e-9)
