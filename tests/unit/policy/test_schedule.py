from hypothesis import given
from hypothesis import strategies as st

from lib.machine import TierSpec
from lib.policy.schedule import Gain, Job, Schedule, Urgency, window_seconds
from lib.vocabulary import Tier

SSD = TierSpec("SSD", 100, 1.0)
TIERS = {Tier.SSD: SSD, Tier.CPU: TierSpec("CPU", 1, 10.0)}
MB = 10**6


def job(
    block: str, urgency: Urgency, needed_at: float | None = None, *, num_bytes: int = MB
) -> Job:
    return Job(
        block=block, tier=Tier.SSD, num_bytes=num_bytes, urgency=urgency, needed_at=needed_at
    )


def taken(schedule: Schedule, now: float = 0.0) -> list[str]:
    blocks = []
    while (each := schedule.take(Tier.SSD, now)) is not None:
        blocks.append(each.block)
    return blocks


def test_a_window_is_transfer_decode_and_margin() -> None:
    transfer = SSD.transfer_seconds(MB)
    assert window_seconds(SSD, MB, decode_seconds=0.5, margin=0.25) == transfer * 1.25 + 0.5
    assert window_seconds(TIERS[Tier.CPU], MB) < window_seconds(SSD, MB)


def test_demand_goes_first_then_what_has_to_begin_soonest_then_the_background() -> None:
    schedule = Schedule(TIERS)
    schedule.ask(job("good", Urgency.BACKGROUND))
    schedule.ask(job("later", Urgency.PREDICTED, 9.0))
    schedule.ask(job("soon", Urgency.PREDICTED, 5.0))
    schedule.ask(job("now", Urgency.DEMAND))
    assert taken(schedule) == ["now", "soon", "later", "good"]
    assert len(schedule) == 0


def test_the_background_leaves_the_bandwidth_that_is_needed_soon() -> None:
    schedule = Schedule(TIERS)
    schedule.ask(job("large", Urgency.BACKGROUND, num_bytes=100 * MB))
    schedule.ask(job("soon", Urgency.PREDICTED, 5.0))
    first = schedule.take(Tier.SSD, 0.0)
    assert first is not None and first.block == "soon"
    schedule.ask(job("soon", Urgency.PREDICTED, 0.05))
    schedule.ask(job("small", Urgency.BACKGROUND, num_bytes=MB))
    assert taken(schedule) == ["soon", "large", "small"]
    assert schedule.take(Tier.CPU, 0.0) is None


def test_a_demand_takes_the_place_of_what_was_predicted_and_stays() -> None:
    schedule = Schedule(TIERS)
    schedule.ask(job("a", Urgency.PREDICTED, 9.0))
    schedule.ask(job("b", Urgency.PREDICTED, 5.0))
    schedule.ask(job("a", Urgency.DEMAND))
    schedule.ask(job("a", Urgency.BACKGROUND))
    assert not schedule.cancel("a")
    assert schedule.cancel("b") and not schedule.cancel("b")
    assert "b" not in schedule
    assert taken(schedule) == ["a"]
    schedule.ask(job("c", Urgency.PREDICTED))
    schedule.ask(job("d", Urgency.BACKGROUND))
    assert schedule.cancel_all(Urgency.PREDICTED) == ["c"]
    assert taken(schedule) == ["d"]


@given(
    jobs=st.lists(
        st.tuples(
            st.sampled_from("abcdef"),
            st.sampled_from(Urgency),
            st.floats(0, 1),
            st.integers(1, 50 * MB),
        ),
        max_size=20,
    )
)
def test_each_block_is_moved_once_and_no_background_job_delays_another(
    jobs: list[tuple[str, Urgency, float, int]],
) -> None:
    schedule = Schedule(TIERS)
    most_urgent: dict[str, Urgency] = {}
    for block, urgency, needed_at, size in jobs:
        schedule.ask(job(block, urgency, needed_at, num_bytes=size))
        most_urgent[block] = min(urgency, most_urgent.get(block, urgency))
    order = []
    while (each := schedule.take(Tier.SSD, 0.0)) is not None:
        order.append(each)
    assert sorted(each.block for each in order) == sorted(most_urgent)
    assert all(each.urgency is most_urgent[each.block] for each in order)
    assert [each.urgency for each in order] == sorted(each.urgency for each in order)


def test_predicting_is_off_where_it_costs_more_than_it_saves_and_tried_again() -> None:
    gain = Gain(trial=4, retry=8)
    for _ in range(4):
        assert gain.pays
        gain.wasted(1.0)
    assert not gain.pays
    for _ in range(8):
        gain.passed()
    assert gain.pays
    for _ in range(10):
        gain.used(2.0)
        gain.wasted(1.0)
    assert gain.pays
