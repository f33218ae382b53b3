from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.policy.planner.knapsack import Kind, fill, fractional_value, sort_by_density

kinds_lists = st.lists(
    st.builds(Kind, st.integers(0, 30), st.floats(0, 10), st.integers(0, 3)), max_size=5
)


@given(kinds_lists, st.integers(0, 150))
def test_small_problems_are_solved_exactly(kinds: list[Kind], capacity: int) -> None:
    counts = fill(kinds, capacity)
    assert all(0 <= count <= kind.count for kind, count in zip(kinds, counts, strict=True))
    assert _total(kinds, counts, "weight") <= capacity
    best = max(
        _total(kinds, choice, "value")
        for choice in product(*(range(kind.count + 1) for kind in kinds))
        if _total(kinds, choice, "weight") <= capacity
    )
    assert _total(kinds, counts, "value") == pytest.approx(best, rel=1e-5)
    bound = fractional_value(kinds, sort_by_density(kinds), capacity)
    assert best <= bound * (1 + 1e-9)


def test_the_capacity_is_filled_to_the_byte_where_sizes_allow() -> None:
    sizes = [206_000_001, 33_587_200, 16_793_600, 8_192, 4_194_304]
    kinds = [Kind(size, size / 1e9, 24) for size in sizes]
    target = 3 * sizes[1] + 7 * sizes[2] + 5 * sizes[3] + sizes[4]
    assert _total(kinds, fill(kinds, target), "weight") == target


def test_thousands_of_kinds_are_filled_to_within_a_hair_of_the_bound() -> None:
    kinds = [Kind(1000 + index * 7919 % 100_003, 1.0 + index % 13, 1) for index in range(5000)]
    counts = fill(kinds, 50_000_000)
    value = _total(kinds, counts, "value")
    assert value >= 0.9999 * fractional_value(kinds, sort_by_density(kinds), 50_000_000)


def _total(kinds: list[Kind], counts: object, what: str) -> float:
    return sum(getattr(kind, what) * count for kind, count in zip(kinds, counts, strict=True))  # type: ignore[call-overload]
