import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import LinearConstraint, milp

from lib.errors import InputError
from lib.precision.allocate import Allocation, Option, allocate_precisions
from lib.vocabulary import Precision

LADDER = [Precision.BF16, Precision.INT8, Precision.INT6, Precision.INT5, Precision.INT4]
LADDER += [Precision.INT3, Precision.INT2]
BITS = [16, 8, 6.5, 5.5, 4.5, 3.5, 2.5]
Options = dict[str, list[Option]]


def random_options(count: int, seed: int) -> Options:
    """Blocks of log-normal sensitivity; a bit less costs 4.5 times the KL."""
    random = np.random.default_rng(seed)
    sizes = random.integers(1000, 10**7, count)
    scales = np.exp(random.normal(0, 2, count)) * 1e-6
    return {
        f"b{index}": [
            Option(
                precision,
                float(sizes[index] * bits // 8),
                0.0 if bits == 16 else float(scales[index] * 4.5 ** (8 - bits)),
            )
            for precision, bits in zip(LADDER, BITS, strict=True)
        ]
        for index in range(count)
    }


def cost_at(options: Options, bits: float) -> float:
    """The cost budget of an average width."""
    return sum(choices[0].cost for choices in options.values()) * bits / 16


def solve_exactly(options: Options, *, cost_budget: float | None, kl_budget: float | None) -> float:
    """The least KL, or the least cost, by an integer program; raises if there is none."""
    flat = [(block, option) for block, choices in enumerate(options.values()) for option in choices]
    member = np.array([[block == row for block, _ in flat] for row in range(len(options))], float)
    cost = np.array([option.cost for _, option in flat])
    kl = np.array([option.kl for _, option in flat])
    spent, lost, budget = (cost, kl, cost_budget) if kl_budget is None else (kl, cost, kl_budget)
    assert budget is not None
    unit, scale = budget or spent.max() or 1.0, lost.max() or 1.0
    solution = milp(
        lost / scale,
        constraints=[
            LinearConstraint(member, 1, 1),
            LinearConstraint(spent[None] / unit, -np.inf, budget / unit),
        ],
        integrality=np.ones(len(flat)),
        bounds=(0, 1),
        options={"mip_rel_gap": 1e-7},
    )
    assert solution.x is not None, solution.message
    return float(np.round(solution.x) @ lost)


def is_choice(allocation: Allocation, options: Options) -> bool:
    return list(allocation.options) == list(options) and all(
        allocation.options[name] in choices for name, choices in options.items()
    )


@st.composite
def problems(draw: st.DrawFn) -> Options:
    """A few blocks with any options, also dominated, equal and concave ones."""
    option = st.tuples(st.integers(1, 1000), st.integers(0, 10**6))
    return {
        f"b{index}": [
            Option(precision, float(cost), kl * 2.0**-30)
            for precision, (cost, kl) in zip(
                LADDER, draw(st.lists(option, min_size=1, max_size=5)), strict=False
            )
        ]
        for index in range(draw(st.integers(1, 7)))
    }


@settings(max_examples=150, deadline=None)
@given(options=problems(), percent=st.integers(0, 100))
def test_small_problems_are_solved_within_one_percent_of_the_best(
    options: Options, percent: int
) -> None:
    for name in ("cost", "kl"):
        values = [[getattr(option, name) for option in choices] for choices in options.values()]
        low, high = sum(map(min, values)), sum(map(max, values))
        budget = low + (high - low) * percent / 100
        limits = {f"{name}_budget": budget}
        allocation = allocate_precisions(options, **limits)
        best = solve_exactly(options, **{"cost_budget": None, "kl_budget": None, **limits})
        found = allocation.kl if name == "cost" else allocation.cost
        assert is_choice(allocation, options)
        assert getattr(allocation, name) <= budget
        assert found <= best * 1.01 + 1e-12
        assert allocation.gap <= 0.01
        assert best * (1 + 1e-6) + 1e-12 >= found * (1 - allocation.gap)


@pytest.mark.parametrize("count", [8, 48, 224])
@pytest.mark.parametrize("bits", [3.0, 4.5, 6.0])
def test_real_sizes_are_solved_within_a_hair_of_the_best(count: int, bits: float) -> None:
    options = random_options(count, seed=count)
    budget = cost_at(options, bits)
    allocation = allocate_precisions(options, cost_budget=budget)
    assert allocation.cost <= budget
    assert allocation.gap <= 1e-3
    best = solve_exactly(options, cost_budget=budget, kl_budget=None)
    assert allocation.kl <= best * (1 + 1e-3)


def test_a_budget_of_kl_is_the_same_problem_seen_from_the_other_side() -> None:
    options = random_options(100, seed=1)
    within_bytes = allocate_precisions(options, cost_budget=cost_at(options, 4.5))
    within_kl = allocate_precisions(options, kl_budget=within_bytes.kl)
    assert within_kl.kl <= within_bytes.kl
    assert within_kl.cost <= within_bytes.cost * 1.001
    assert within_kl.exchange_rate == pytest.approx(within_bytes.exchange_rate, rel=0.1)


def test_no_change_within_the_budget_is_worth_more_than_the_exchange_rate() -> None:
    options = random_options(500, seed=2)
    allocation = allocate_precisions(options, cost_budget=cost_at(options, 4.0))
    rate = allocation.exchange_rate
    for name, choices in options.items():
        chosen = allocation.options[name]
        for other in choices:
            # Lagrangian optimality, but for the few blocks at which the budget ends.
            price = (other.kl + rate * other.cost) - (chosen.kl + rate * chosen.cost)
            assert price >= -1e-3 * allocation.kl


def test_what_is_moved_more_often_gets_fewer_bits() -> None:
    once = Option(Precision.INT8, 1000.0, 1e-5), Option(Precision.INT4, 500.0, 1e-3)
    often = Option(Precision.INT8, 4000.0, 1e-5), Option(Precision.INT4, 2000.0, 1e-3)
    allocation = allocate_precisions({"once": once, "often": often}, kl_budget=1.5e-3)
    assert allocation.precisions == {"once": Precision.INT8, "often": Precision.INT4}


def test_a_budget_for_everything_is_not_cut() -> None:
    options = random_options(5, seed=3)
    best = allocate_precisions(options, cost_budget=1e12)
    assert set(best.precisions.values()) == {Precision.BF16}
    assert (best.kl, best.gap) == (0.0, 0.0)
    cheapest = allocate_precisions(options, kl_budget=1e9)
    assert set(cheapest.precisions.values()) == {Precision.INT2}
    assert allocate_precisions({}, cost_budget=0).options == {}


def test_too_small_a_budget_names_the_smallest() -> None:
    options = random_options(5, seed=4)
    smallest = sum(choices[-1].cost for choices in options.values())
    with pytest.raises(InputError, match=f"the smallest that works is {smallest}"):
        allocate_precisions(options, cost_budget=smallest - 1)
    assert allocate_precisions(options, cost_budget=smallest).cost == smallest


def test_twenty_thousand_blocks_take_less_than_a_second() -> None:
    options = random_options(20_000, seed=5)
    seconds = []
    for _ in range(2):  # the faster of two: the machine may be busy
        start = time.process_time()
        allocation = allocate_precisions(options, cost_budget=cost_at(options, 4.5))
        seconds.append(time.process_time() - start)
    assert allocation.gap < 1e-5
    assert min(seconds) < 1
