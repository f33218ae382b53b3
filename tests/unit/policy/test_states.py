from itertools import permutations

import pytest

from lib.errors import PlacementError
from lib.policy import ALLOWED, Transition, placed_state
from lib.vocabulary import Precision, State, Tier

BELOW = [State.STAGED, State.COLD]
RESIDENT = [State.FULL, State.REDUCED, State.COMPRESSED]


def test_there_are_seven_states() -> None:
    assert [str(state) for state in State] == [f"S{number}" for number in range(1, 8)]
    assert set(ALLOWED) == set(State)
    assert all(state not in following for state, following in ALLOWED.items())


@pytest.mark.parametrize("below", BELOW)
@pytest.mark.parametrize("resident", RESIDENT)
def test_fast_memory_is_entered_in_flight_only(below: State, resident: State) -> None:
    with pytest.raises(PlacementError, match=f"can't go from {below} to {resident}"):
        Transition(block="h.0.attn", before=below, after=resident, reason="promotion")
    Transition(block="b", before=below, after=State.IN_FLIGHT, reason="promotion")
    Transition(block="b", before=State.IN_FLIGHT, after=resident, reason="promotion")
    Transition(block="b", before=resident, after=below, reason="demotion")


@pytest.mark.parametrize("before, after", list(permutations(RESIDENT, 2)))
def test_precision_changes_by_way_of_the_original_only(before: State, after: State) -> None:
    with pytest.raises(PlacementError, match="allowed: S4, S5"):
        Transition(block="b", before=before, after=after, reason="wish")


def test_a_transition_knows_how_long_it_took() -> None:
    change = Transition(
        block="b", before=State.FULL, after=State.COLD, reason="", begin=2.0, end=2.5, num_bytes=3
    )
    assert change.seconds == 0.5


def test_a_tied_copy_goes_nowhere() -> None:
    with pytest.raises(PlacementError, match="allowed: nothing"):
        Transition(block="b", before=State.RECOMPUTABLE, after=State.FULL, reason="wish")


def test_a_place_and_a_precision_make_a_state() -> None:
    assert placed_state(Tier.HBM, Precision.FP32, computed_as_is=False) is State.FULL
    assert placed_state(Tier.HBM, Precision.BF16, computed_as_is=True) is State.REDUCED
    assert placed_state(Tier.HBM, Precision.INT8, computed_as_is=True) is State.REDUCED
    assert placed_state(Tier.HBM, Precision.INT5, computed_as_is=False) is State.COMPRESSED
    assert placed_state(Tier.CPU, Precision.INT5, computed_as_is=False) is State.STAGED
    assert placed_state(Tier.SSD, Precision.FP32, computed_as_is=False) is State.COLD
