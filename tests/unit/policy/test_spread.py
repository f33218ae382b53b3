from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from lib.policy.planner.spread import phases, pick_evenly


@given(st.integers(1, 200), st.data(), st.floats(0, 0.999))
def test_picked_places_are_distinct_and_evenly_apart(
    count: int, data: st.DataObject, phase: float
) -> None:
    chosen = data.draw(st.integers(1, count))
    places = pick_evenly(count, chosen, phase)
    assert len(places) == chosen
    assert 0 <= places[0] <= places[-1] < count
    gaps = [after - before for before, after in pairwise([*places, places[0] + count])]
    assert sum(gaps) == count
    assert min(gaps) >= max(1, count // chosen - 1)
    assert max(gaps) <= -(-count // chosen) + 1


def test_nothing_can_be_picked() -> None:
    assert pick_evenly(7, 0, 0.5) == []


def test_groups_get_phases_of_their_own() -> None:
    assert list(phases(2, 0)) == [0.5, 0.5]
    assert list(phases(2, 1)) == [0.25, 0.75]
    assert list(phases(2, 2)) == [0.75, 0.25]
