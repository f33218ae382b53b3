"""How many tokens a window has."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.progressive.windows import Windows, expected_tokens


def seen(*, accepted: int, drafted: int, draft: float, full: float, times: int = 40) -> Windows:
    """Return windows that have seen the same one over and over; seconds of a token and a pass."""
    windows = Windows(longest=31)
    windows.begin()
    for _ in range(times):
        windows.saw([accepted], drafted=drafted, draft_seconds=draft * drafted, pass_seconds=full)
    return windows


def test_first_windows_double() -> None:
    windows = Windows(longest=31)
    windows.begin()
    lengths = []
    for _ in range(7):
        lengths.append(windows.choose())
        windows.saw([lengths[-1]], drafted=lengths[-1], draft_seconds=0.0, pass_seconds=1.0)
    assert lengths == [1, 2, 4, 8, 16, 31, 31]


def test_a_text_begins_with_as_much_as_a_pass_takes_to_draft() -> None:
    for draft, first in ((0.1, 10), (2.0, 1), (0.001, 31)):
        windows = seen(accepted=16, drafted=16, draft=draft, full=1.0)
        windows.begin()
        assert windows.choose() <= first
        if draft < 1:
            assert windows.choose() == first


def test_a_slow_pass_wants_long_windows_and_a_wrong_draft_short_ones() -> None:
    assert seen(accepted=16, drafted=16, draft=0.01, full=1.0).choose() == 31
    assert seen(accepted=1, drafted=8, draft=0.01, full=0.1).choose() <= 5
    assert seen(accepted=0, drafted=8, draft=0.1, full=0.1).choose() == 1


def test_one_slow_draft_is_forgiven() -> None:
    windows = Windows(longest=31)
    windows.begin()
    windows.saw([1], drafted=1, draft_seconds=80.0, pass_seconds=1.0)  # it was compiled
    for _ in range(6):
        windows.saw([16], drafted=16, draft_seconds=0.16, pass_seconds=1.0)
    assert windows.choose() == 31


def test_acceptance_is_of_the_latest_tokens() -> None:
    windows = seen(accepted=16, drafted=16, draft=0.01, full=0.1)
    assert windows.acceptance > 0.99
    for _ in range(60):
        windows.saw([0], drafted=4, draft_seconds=0.04, pass_seconds=0.1)
    assert windows.acceptance < 0.4


def test_a_batch_counts_each_sequence() -> None:
    one, many = Windows(longest=31), Windows(longest=31)
    one.saw([2], drafted=4, draft_seconds=0.1, pass_seconds=0.1)
    many.saw([2, 4, 4], drafted=4, draft_seconds=0.1, pass_seconds=0.1)
    assert many.acceptance > one.acceptance


def test_a_window_without_drafts_says_nothing_of_the_draft() -> None:
    windows = Windows(longest=31)
    before = windows.acceptance
    windows.saw([0], drafted=0, draft_seconds=0.0, pass_seconds=0.1)
    assert windows.acceptance == before


@given(
    st.lists(
        st.tuples(
            st.integers(0, 31),
            st.integers(0, 31),
            st.floats(0, 10, allow_nan=False),
            st.floats(0, 10, allow_nan=False),
        ),
        max_size=30,
    ),
    st.integers(1, 31),
)
def test_windows_stay_within_their_bounds(
    observed: list[tuple[int, int, float, float]], longest: int
) -> None:
    windows = Windows(longest=longest)
    windows.begin()
    for drafted, accepted, draft, full in observed:
        assert 1 <= windows.choose() <= longest
        assert 0 < windows.acceptance <= 1
        windows.saw(
            [min(accepted, drafted)], drafted=drafted, draft_seconds=draft, pass_seconds=full
        )


@pytest.mark.parametrize(
    ("acceptance", "drafted", "tokens"), [(1.0, 4, 5.0), (0.0, 4, 1.0), (0.5, 2, 1.75), (0.9, 0, 1)]
)
def test_expected_tokens(acceptance: float, drafted: int, tokens: float) -> None:
    assert expected_tokens(acceptance, drafted) == pytest.approx(tokens)
