"""What was read ahead: judged by its layer's next call."""

from lib.tiering.residency.guesses import Guesses


def test_only_what_wrong_guesses_evicted_counts_against_them() -> None:
    guesses = Guesses()
    guesses.add(1, 4, [(0, 2)])
    guesses.add(1, 5, [(0, 3)])
    guesses.add(2, 6, ())
    assert guesses and guesses.of(1) == (4, 5)
    guesses.settle(1, {4, 7}, bypasses=False)
    assert guesses.take_right(1, 4) and not guesses.take_right(1, 4)
    assert not guesses.take_right(1, 5)
    assert not guesses.take_gone(0, 2)
    assert guesses.take_gone(0, 3) and not guesses.take_gone(0, 3)
    assert guesses.of(1) == ()
    guesses.drop(2, 6)
    assert not guesses


def test_where_a_read_on_demand_would_bypass_the_cache_right_guesses_evict_as_well() -> None:
    guesses = Guesses()
    guesses.add(1, 4, [(0, 2)])
    guesses.add(1, 5, [(0, 3)])
    guesses.settle(1, {4}, bypasses=True)
    assert guesses.take_right(1, 4)
    assert guesses.take_gone(0, 2) and guesses.take_gone(0, 3)
