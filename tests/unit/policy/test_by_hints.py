"""Placing blocks by their hints alone."""

from hypothesis import given
from hypothesis import strategies as st
from toy_blocks import MIB, make_layers, make_need

from lib.policy.planner.by_hints import place_by_hints
from lib.vocabulary import Precision, State, Tier


def hint(tier: Tier) -> dict[Tier, int]:
    return {tier: MIB}


def test_each_block_goes_to_its_hints_tier() -> None:
    tiers = {"a": Tier.HBM, "b": Tier.CPU, "c": Tier.SSD}
    needs = [make_need(name, MIB, unit_bytes=(MIB,)) for name in tiers]
    plan = place_by_hints(
        needs, {name: hint(tier) for name, tier in tiers.items()}, scratch_bytes=7
    )
    assert {name: place.tier for name, place in plan.placements.items()} == tiers
    states = [place.state for place in plan.placements.values()]
    assert states == [State.FULL, State.STAGED, State.COLD]
    assert (plan.scratch_bytes, plan.budget, plan.predicted.seconds) == (7, {}, 0)
    assert plan.fast_bytes == MIB + 7 + plan.num_slots * MIB


def test_blocks_that_move_together_go_where_most_of_their_bytes_should_be() -> None:
    [need] = [make_need("experts", 8 * MIB)]
    for sums, tier in (
        ({Tier.HBM: 5, Tier.SSD: 3}, Tier.HBM),
        ({Tier.HBM: 3, Tier.SSD: 5}, Tier.SSD),
        ({Tier.HBM: 4, Tier.SSD: 4}, Tier.SSD),
    ):
        plan = place_by_hints([need], {"experts": sums}, scratch_bytes=0)
        assert plan.placements["experts"].tier is tier


def test_what_others_compute_inside_stays_in_fast_memory() -> None:
    need = make_need("whole", MIB, must_reside=True, unit_bytes=(MIB,))
    place = place_by_hints([need], {"whole": hint(Tier.SSD)}, scratch_bytes=0).placements["whole"]
    assert (place.tier, place.unit_bytes) == (Tier.HBM, ())
    assert place.reason == "other blocks compute inside it"


def test_compressed_blocks_have_the_state_of_their_precision() -> None:
    int8 = make_need("int8", MIB, precision=Precision.INT8, computed_as_is=True)
    int3 = make_need("int3", MIB, precision=Precision.INT3)
    plan = place_by_hints(
        [int8, int3], {"int8": hint(Tier.HBM), "int3": hint(Tier.HBM)}, scratch_bytes=0
    )
    assert plan.placements["int8"].state is State.REDUCED
    assert plan.placements["int3"].state is State.COMPRESSED


@given(st.lists(st.booleans(), min_size=12, max_size=12))
def test_slots_are_the_size_of_the_largest_unit_and_worth_their_memory(away: list[bool]) -> None:
    needs = [
        make_need(need.name, need.resident_bytes, unit_bytes=(need.stored_bytes,))
        for need in make_layers(6)
    ]
    hinted = {
        need.name: hint(Tier.SSD if there else Tier.HBM)
        for need, there in zip(needs, away, strict=True)
    }
    plan = place_by_hints(needs, hinted, scratch_bytes=0)
    units = [size for place in plan.placements.values() for size in place.unit_bytes]
    saved = sum(need.resident_bytes for need, there in zip(needs, away, strict=True) if there)
    assert plan.slot_bytes == max(units, default=0)
    assert plan.num_slots <= 2 and (plan.num_slots > 0) == any(away)
    if plan.num_slots == 2:
        assert plan.num_slots * plan.slot_bytes < saved / 2
