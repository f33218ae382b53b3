"""Random plans as ledgers choose them."""

from functools import cache

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lib.precision.plans import draw_precisions, predicted_kl
from lib.precision.sensitivity import Curves, magnitude_curves
from lib.precision.sizes import StoredSizes, stored_sizes
from lib.vocabulary import Precision

LADDER = (Precision.INT8, Precision.INT4, Precision.INT2)


@cache
def toy() -> tuple[GPT2LMHeadModel, StoredSizes, Curves]:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_embd=64, n_head=2, vocab_size=80, n_positions=64)
    )
    return model, stored_sizes(model, LADDER), magnitude_curves(model, precisions=LADDER)


def test_plans_change_something_and_span_the_range() -> None:
    model, sizes, curves = toy()
    plans = draw_precisions(model, sizes, curves, count=60, seed=0)
    predicted = [predicted_kl(curves, plan) for plan in plans]
    assert len(plans) == 60 and min(predicted) > 0
    assert max(predicted) > 100 * min(predicted)
    assert all(plan.keys() <= sizes.num_params.keys() for plan in plans)
    assert {precision for plan in plans for precision in plan.values()} == set(LADDER)
    assert any(len(plan) < len(sizes.num_params) for plan in plans)  # some blocks stay as they are
    assert len({tuple(sorted(plan.items())) for plan in plans}) > 30


def test_the_seed_decides() -> None:
    model, sizes, curves = toy()
    first, again, other = (
        draw_precisions(model, sizes, curves, count=5, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again != other


def test_a_width_that_changes_nothing_is_no_plan() -> None:
    model, sizes, curves = toy()
    exact = {name: {**curve, Precision.INT8: 0.0} for name, curve in curves.items()}
    for plan in draw_precisions(model, sizes, exact, count=20, seed=0):
        assert predicted_kl(exact, plan) > 0
