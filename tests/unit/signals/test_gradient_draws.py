"""Draws of gradients: their labels, and their agreement with autograd's own loss."""

import pytest
import torch
from torch.nn import functional

from lib.blocks import unique_parameters
from lib.signals.gradients import FisherLabels, GradientSampler, sample_labels
from tests.unit.signals.signal_models import token_batches, toy_lm


def test_labels_have_their_probabilities() -> None:
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0]).repeat(20_000, 1)
    labels = sample_labels(probabilities, torch.Generator().manual_seed(0))
    shares = labels.flatten().bincount(minlength=6) / len(labels)
    torch.testing.assert_close(shares, probabilities[0], rtol=0, atol=0.015)
    assert shares[[0, 2, 5]].sum() == 0


def test_gradients_are_those_of_the_summed_loss() -> None:
    model = toy_lm().eval()
    (ids,) = token_batches(1, batch=1)
    with GradientSampler(model, labels=FisherLabels.DATA) as sampler:
        (draw,) = sampler.draws(ids)
    logits = model(input_ids=ids).logits
    loss = functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")
    parameters = unique_parameters(model)
    expected = torch.autograd.grad(loss, list(parameters.values()))
    for name, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(draw.gradients[name], gradient, msg=name)
    assert draw.tokens == ids.numel() - 1


@pytest.mark.parametrize("labels", list(FisherLabels))
def test_a_draw_depends_on_its_number_alone(labels: FisherLabels) -> None:
    model, batches = toy_lm(), token_batches(3)
    with GradientSampler(model, labels=labels, seed=5) as sampler:
        draws = [draw for batch in batches for draw in sampler.draws(batch)]
    with GradientSampler(model, labels=labels, seed=5) as sampler:
        sampler.number = len(draws) * 2 // 3
        last = list(sampler.draws(batches[2]))
    for first, again in zip(draws[-len(last) :], last, strict=True):
        for name, gradient in again.gradients.items():
            assert torch.equal(gradient, first.gradients[name])
