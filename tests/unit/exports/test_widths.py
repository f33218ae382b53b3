"""Which precision a block gets in another tool's format."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.errors import InputError
from lib.exports.widths import Candidate, choose_widths
from lib.hints import BlockHint
from lib.vocabulary import Precision, Tier

STEPS = (Precision.INT6, Precision.INT5, Precision.INT4, Precision.INT3)
BITS = {
    Precision.BF16: 16.0,
    Precision.INT8: 8.5,
    **dict(zip(STEPS, (6.5, 5.5, 4.5, 3.5), strict=True)),
}
ORDER = list(Precision)


def candidate(
    name: str,
    importance: float | None,
    num_params: int = 1000,
    floor: Precision | None = None,
    kl: dict[Precision, float] | None = None,
) -> Candidate:
    return Candidate(
        name=name,
        hint=BlockHint(tier=Tier.HBM, importance=importance, floor=floor, kl=kl or {}),
        num_params=num_params,
        sizes={precision: bits * num_params for precision, bits in BITS.items()},
    )


candidates_of_all_kinds = st.lists(
    st.tuples(
        st.floats(0, 1),
        st.integers(1, 10_000),
        st.sampled_from(
            [None, None, Precision.BF16, Precision.INT8, Precision.INT4, Precision.INT2]
        ),
    ),
    min_size=1,
    max_size=8,
).map(
    lambda rows: [
        candidate(f"b{i}", value, num, floor) for i, (value, num, floor) in enumerate(rows)
    ]
)


@given(candidates_of_all_kinds, st.floats(3.5, 7))
def test_floors_and_budget_hold_and_nothing_is_left_that_fits(
    candidates: list[Candidate], bits: float
) -> None:
    try:
        widths = choose_widths(candidates, STEPS, bits)
    except InputError as error:
        assert "too few" in str(error)
        return
    num_params = sum(c.num_params for c in candidates)
    assert widths.bits <= bits * (1 + 1e-9)
    left = (bits - widths.bits) * num_params

    def kl(c: Candidate, precision: Precision) -> float:
        width = 16 if precision is Precision.BF16 else int(precision[3:])
        return (c.hint.importance or 0.0) * c.num_params * 4.0**-width

    total = sum(kl(c, widths.precisions[c.name]) for c in candidates)
    for c in candidates:
        chosen = widths.precisions[c.name]
        floor = c.hint.floor
        assert floor is None or ORDER.index(chosen) <= ORDER.index(floor)
        if chosen in STEPS[1:]:
            up = STEPS[STEPS.index(chosen) - 1]
            fits = c.sizes[up] - c.sizes[chosen] < left - 1e-6
            assert not fits or kl(c, chosen) - kl(c, up) <= 1e-3 * total


@given(st.lists(st.floats(1e-6, 1), min_size=2, max_size=8), st.floats(3.5, 6.5))
def test_of_equal_blocks_the_more_important_never_gets_fewer_bits(
    importance: list[float], bits: float
) -> None:
    candidates = [candidate(f"b{i}", value) for i, value in enumerate(importance)]
    chosen = choose_widths(candidates, STEPS, bits).precisions
    for a in candidates:
        for b in candidates:
            assert a.hint.importance is not None and b.hint.importance is not None
            if a.hint.importance > b.hint.importance:
                assert ORDER.index(chosen[a.name]) <= ORDER.index(chosen[b.name])


def test_curves_decide_where_there_are_some() -> None:
    flat = dict.fromkeys(STEPS, 1e-3)
    steep = {Precision.INT6: 1e-4, Precision.INT5: 1e-3, Precision.INT4: 1e-2, Precision.INT3: 0.1}
    widths = choose_widths(
        [candidate("important", 1.0, kl=flat), candidate("fragile", 0.1, kl=steep)], STEPS, 5.0
    )
    assert widths.basis == "kl" and widths.lost == ()
    assert widths.precisions == {"important": Precision.INT3, "fragile": Precision.INT6}
    assert widths.predicted_kl == pytest.approx(1.1e-3)


def test_curves_of_some_blocks_are_not_mixed_with_importance() -> None:
    known = candidate("known", 0.1, kl=dict.fromkeys(STEPS, 1e-3))
    widths = choose_widths([known, candidate("unknown", 1.0)], STEPS, 5.0)
    assert widths.basis == "importance" and widths.predicted_kl is None
    assert "unknown have none" in widths.lost[0]


def test_floors_alone_are_taken_as_they_are() -> None:
    blocks = [candidate("a", 1.0, floor=Precision.INT4), candidate("b", 0.1, floor=Precision.FP16)]
    widths = choose_widths(blocks, STEPS, None)
    assert widths.basis == "floors"
    assert widths.precisions == {"a": Precision.INT4, "b": Precision.BF16}
    # With a budget there is more than the floors ask for.
    assert choose_widths(blocks, STEPS, 12.0).precisions["a"] is Precision.INT6


def test_a_block_without_a_signal_keeps_the_most_precise_type() -> None:
    widths = choose_widths([candidate("frozen", None), candidate("other", 1.0)], STEPS, 5.0)
    assert widths.precisions == {"frozen": Precision.INT6, "other": Precision.INT3}
    assert "no signal for frozen" in widths.lost[0]


def test_the_default_is_the_mean_of_the_steps() -> None:
    widths = choose_widths([candidate(f"b{i}", 0.5**i) for i in range(8)], STEPS, None)
    assert widths.bits == pytest.approx(5.0)
    assert set(widths.precisions.values()) == set(STEPS)


def test_too_few_bits_and_hints_that_rank_nothing_are_refused() -> None:
    with pytest.raises(InputError, match=r"--bits 3.0 is too few: .* least is 3.5"):
        choose_widths([candidate("a", 1.0)], STEPS, 3.0)
    with pytest.raises(InputError, match="no importance and no KL curves"):
        choose_widths([replace(candidate("a", None))], STEPS, None)
