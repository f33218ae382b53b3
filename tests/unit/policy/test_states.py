from itertools import pairwise, product

import pytest

from lib.errors import PlacementError
from lib.policy import ALLOWED, Transition, find_path, placed_state
from lib.vocabulary import Precision, State, Tier

AT_REST = [state for state in State if state is not State.IN_FLIGHT]


def test_there_are_seven_states_and_each_can_be_left() -> None:
    assert [str(state) for state in State] == [f"S{number}" for number in range(1, 8)]
    assert set(ALLOWED) == set(State)
    assert all(following and state not in following for state, following in ALLOWED.items())


@pytest.mark.parametrize("before, after", list(product(AT_REST, repeat=2)))
def test_every_state_at_rest_is_reached_by_allowed_steps(before: State, after: State) -> None:
    path = find_path(before, after)
    assert (path[0], path[-1]) == (before, after)
    for first, second in pairwise(path):
        Transition(block="b", before=first, after=second, reason="test")


@pytest.mark.parametrize("below", [State.STAGED, State.COLD, State.RECOMPUTABLE])
@pytest.mark.parametrize("resident", [State.FULL, State.REDUCED, State.COMPRESSED])
def test_fast_memory_is_entered_in_flight_only(below: State, resident: State) -> None:
    with pytest.raises(PlacementError, match=f"can't go from {below} to {resident}"):
        Transition(block="h.0.attn", before=below, after=resident, reason="promotion")


def test_dropped_precision_is_not_won_back_in_place() -> None:
    with pytest.raises(PlacementError, match="from S3 allowed: S2, S4, S5, S7"):
        Transition(block="b", before=State.COMPRESSED, after=State.FULL, reason="wish")
    assert State.IN_FLIGHT in find_path(State.COMPRESSED, State.FULL)


def test_a_place_and_a_precision_make_a_state() -> None:
    assert placed_state(Tier.HBM, Precision.FP32, computed_as_is=False) is State.FULL
    assert placed_state(Tier.HBM, Precision.BF16, computed_as_is=True) is State.REDUCED
    assert placed_state(Tier.HBM, Precision.INT8, computed_as_is=True) is State.REDUCED
    assert placed_state(Tier.HBM, Precision.INT5, computed_as_is=False) is State.COMPRESSED
    assert placed_state(Tier.CPU, Precision.INT5, computed_as_is=False) is State.STAGED
    assert placed_state(Tier.SSD, Precision.FP32, computed_as_is=False) is State.COLD
