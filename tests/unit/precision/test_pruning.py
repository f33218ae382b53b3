"""Scores, masks and the schedule of pruning, against their definitions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_gpt2, tiny_mixtral
from torch import nn

from lib.errors import InputError
from lib.precision.pruning import (
    EPSILON,
    PruneScope,
    PruneScore,
    cubic_sparsity,
    measured_sparsity,
    prunable_parameters,
    score_weights,
    select_masks,
)


def stepped_gpt2(steps: int = 3) -> tuple[nn.Module, torch.optim.AdamW]:
    model = tiny_gpt2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99))
    for seed in range(steps):
        torch.manual_seed(seed)
        ids = torch.randint(40, (2, 16))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_matrices_of_attention_mlp_and_experts_are_pruned_and_nothing_else() -> None:
    names = list(prunable_parameters(tiny_gpt2()))
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert names == [f"transformer.h.{i}.{part}.weight" for i in range(2) for part in parts]
    mixtral = prunable_parameters(tiny_mixtral())
    assert any(parameter.dim() == 3 for parameter in mixtral.values())  # packed experts
    assert not any("embed" in name or "norm" in name or "lm_head" in name for name in mixtral)
    with pytest.raises(InputError, match="no attention or MLP matrices"):
        prunable_parameters(nn.Sequential(nn.Embedding(4, 4)))


def test_scores_are_their_formulas() -> None:
    model, optimizer = stepped_gpt2()
    parameters = prunable_parameters(model)
    name, weight = next(iter(parameters.items()))
    moment = optimizer.state[weight]["exp_avg_sq"] / (1 - 0.99**3)
    exponents = {PruneScore.ADAM: 0.25, PruneScore.SALIENCY: 0.5, PruneScore.MAGNITUDE: 0}
    for score, exponent in exponents.items():
        expected = weight.detach().abs() * (moment + EPSILON) ** exponent
        scores = score_weights(parameters, score, optimizer=optimizer)
        torch.testing.assert_close(scores[name], expected)
        assert all((s >= 0).all() for s in scores.values())
    before = optimizer.state[weight]["exp_avg_sq"].clone()
    score_weights(parameters, PruneScore.ADAM, optimizer=optimizer)
    assert torch.equal(before, optimizer.state[weight]["exp_avg_sq"])


def test_random_scores_are_a_function_of_the_seed_alone() -> None:
    parameters = prunable_parameters(tiny_gpt2())
    first, again, other = (
        score_weights(parameters, PruneScore.RANDOM, seed=seed) for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], again[name]) for name in parameters)
    assert not any(torch.equal(first[name], other[name]) for name in parameters)
    first_layer, second_layer = (first[f"transformer.h.{i}.mlp.c_fc.weight"] for i in range(2))
    assert not torch.equal(first_layer, second_layer)


def test_moments_are_needed_where_the_score_reads_them() -> None:
    model = tiny_gpt2()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(InputError, match="take a step first"):
        score_weights(prunable_parameters(model), PruneScore.ADAM, optimizer=optimizer)
    with pytest.raises(InputError, match="SGD"):
        sgd = torch.optim.SGD(model.parameters())
        score_weights(prunable_parameters(model), PruneScore.ADAM, optimizer=sgd)


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    shares=st.lists(st.integers(0, 99), min_size=1, max_size=4),
    scope=st.sampled_from(PruneScope),
    seed=st.integers(0, 99),
)
def test_masks_have_the_sparsity_keep_the_highest_and_only_grow(
    sizes: list[int], shares: list[int], scope: PruneScope, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    masks = None
    highest = 0.0
    for share in shares:
        highest = max(highest, share / 100)
        # Many ties, and zeros: what was pruned scores 0 for every score but random.
        scores = {
            str(i): torch.randint(4, (n,), generator=generator).float() for i, n in enumerate(sizes)
        }
        earlier = masks
        masks = select_masks(scores, share / 100, scope=scope, masks=masks)
        if earlier is not None:
            assert not any((masks[name] & ~earlier[name]).any() for name in masks)
        groups = [list(masks)] if scope is PruneScope.GLOBAL else [[name] for name in masks]
        for group in groups:
            size = sum(masks[name].numel() for name in group)
            pruned = sum(int((~masks[name]).sum()) for name in group)
            assert pruned == round(highest * size)
            if earlier is None and pruned:
                lost = max(scores[n][~masks[n]].max() for n in group if not masks[n].all())
                assert all((scores[n][masks[n]] >= lost).all() for n in group)
    assert masks is not None
    total = sum(sizes)
    assert measured_sparsity(masks) == pytest.approx(highest, abs=len(sizes) / total)


def test_global_threshold_prunes_the_matrix_that_matters_less() -> None:
    scores = {"low": torch.rand(50), "high": torch.rand(50) + 2}
    masks = select_masks(scores, 0.5, scope=PruneScope.GLOBAL)
    assert not masks["low"].any() and masks["high"].all()
    with pytest.raises(InputError, match=r"sparsity 1\.0 is out of range"):
        select_masks(scores, 1.0, scope=PruneScope.GLOBAL)


def test_sparsity_rises_on_a_cubic_and_stays() -> None:
    values = [cubic_sparsity(step, final=0.8, start=10, end=30) for step in range(60)]
    assert values[:11] == [0.0] * 11
    assert values[20] == pytest.approx(0.8 * (1 - 0.5**3))
    assert values[30:] == [0.8] * 30
    rises = [after - before for before, after in zip(values[10:30], values[11:31], strict=True)]
    assert rises == sorted(rises, reverse=True)
