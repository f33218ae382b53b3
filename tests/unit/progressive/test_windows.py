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


def went_on(
    *, beside: float, step: float, draft: float = 0.02, full: float = 0.5, sequences: int = 1
) -> Windows:
    """Return windows that have seen both ways, all accepted; seconds of a pass, and of a token."""
    windows = Windows(longest=31)
    windows.begin(sequences)
    for number in range(8):
        seconds = {"draft_seconds": 16 * draft, "pass_seconds": beside if number > 3 else full}
        windows.saw(
            [16] * sequences,
            drafted=16,
            beside=(int(beside / step), beside) if number > 3 else None,
            **seconds,
        )
    return windows


def test_the_draft_goes_on_where_that_gives_more_tokens() -> None:
    assert went_on(beside=0.5, step=0.025).goes_on()
    assert went_on(beside=0.6, step=0.025).goes_on()
    assert not went_on(beside=1.3, step=0.025).goes_on()  # it slows the pass
    assert not went_on(beside=0.5, step=0.4).goes_on()  # nothing comes of it
    assert not went_on(beside=0.5, step=1.0).goes_on()


def test_the_draft_rests_until_times_are_known_and_where_little_can_be_gained() -> None:
    assert not Windows(longest=31).goes_on()
    assert seen(accepted=16, drafted=16, draft=0.02, full=0.5).goes_on()  # to see
    assert not seen(accepted=16, drafted=16, draft=0.0001, full=0.5).goes_on()
    assert not seen(accepted=1, drafted=4, draft=0.02, full=0.5).goes_on()
    many = seen(accepted=12, drafted=16, draft=0.02, full=0.5)
    assert many.goes_on()
    many.begin(40)  # which will hardly all be right
    assert not many.goes_on()


@pytest.mark.parametrize("gains", [True, False])
def test_the_other_way_is_tried_now_and_then(gains: bool) -> None:
    windows = went_on(beside=0.5 if gains else 1.3, step=0.025)
    ways = []
    for _ in range(64):
        ways.append(windows.goes_on())
        beside = (20, 0.5) if ways[-1] else None
        pass_seconds = 1.3 if ways[-1] and not gains else 0.5
        windows.saw([16], drafted=16, draft_seconds=0.32, pass_seconds=pass_seconds, beside=beside)
    assert 2 <= ways.count(not gains) <= 5
    assert ways[0] == gains


def test_what_was_drafted_before_takes_no_time() -> None:
    windows = seen(accepted=16, drafted=16, draft=0.02, full=0.5)
    before = windows.choose()
    for _ in range(9):  # of each, two tokens were drafted now
        windows.saw([16], drafted=16, held=14, draft_seconds=0.04, pass_seconds=0.5)
        windows.saw([16], drafted=16, held=16, draft_seconds=0.0, pass_seconds=0.5)
    assert windows.choose() == before
