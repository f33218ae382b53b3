"""KL, likelihood and agreement against formulas worked out another way."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from lib.errors import InputError
from lib.precision.quality import (
    QualityMeter,
    bootstrap_interval,
    bootstrap_statistic,
    compare_models,
    perplexity,
)


def compare(reference: torch.Tensor, other: torch.Tensor, ids: torch.Tensor):
    return compare_models(lambda _: reference, lambda _: other, [ids])


def test_figures_are_those_of_the_formulas() -> None:
    torch.manual_seed(0)
    full, other = torch.randn(3, 5, 7), torch.randn(3, 5, 7)
    ids = torch.randint(0, 7, (3, 5))
    quality = compare(full, other, ids)
    p = torch.distributions.Categorical(logits=full.double())
    q = torch.distributions.Categorical(logits=other.double())
    kl = torch.distributions.kl_divergence(p, q)
    assert quality.kl_nats == pytest.approx(kl.mean().item(), rel=1e-6)
    assert quality.kl_per_sequence == pytest.approx(kl.mean(1).tolist(), rel=1e-6)
    nll = functional.cross_entropy(other[:, :-1].reshape(-1, 7), ids[:, 1:].reshape(-1))
    assert quality.nll == pytest.approx(nll.item(), rel=1e-6)
    assert quality.perplexity == pytest.approx(math.exp(nll), rel=1e-6)
    same = (full.argmax(-1) == other.argmax(-1)).float().mean().item()
    assert quality.top1_agreement == pytest.approx(same)
    assert (quality.sequences, quality.tokens) == (3, 15)


def test_divergences_far_below_float32_are_resolved() -> None:
    torch.manual_seed(0)
    full = torch.randn(1, 64, 512)
    step = 1e-4 * torch.randn(1, 64, 512)
    quality = compare(full, full + step, torch.zeros(1, 64, dtype=torch.long))
    p = full.double().softmax(-1)
    second_order = 0.5 * ((p * step**2).sum(-1) - (p * step).sum(-1) ** 2).mean()
    assert quality.kl_nats == pytest.approx(second_order.item(), rel=0.02)  # about 5e-9


@pytest.mark.parametrize("step", [1e-3, 0.1, 3.0, 30.0, 300.0])
def test_divergences_of_every_size_are_those_of_float64(step: float) -> None:
    torch.manual_seed(0)
    full = 3 * torch.randn(1, 16, 3000)
    other = full + step * torch.randn(1, 16, 3000) + 7
    quality = compare(full, other, torch.zeros(1, 16, dtype=torch.long))
    log_p, log_q = full.double().log_softmax(-1), other.double().log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    assert quality.kl_nats == pytest.approx(expected, rel=1e-5)
    assert quality.nll == pytest.approx(-log_q[0, :-1, 0].mean().item(), rel=1e-6)


def test_the_interval_covers_the_mean() -> None:
    random = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(60):
        values = torch.randn(40, generator=random).exp().tolist()
        interval = bootstrap_interval(values)
        assert interval is not None
        covered += interval[0] <= math.exp(0.5) <= interval[1]
    assert covered >= 50  # 95 % nominal, somewhat less for a skewed distribution


def test_a_ratio_is_resampled_in_pairs() -> None:
    random = torch.Generator().manual_seed(0)
    first = torch.randn(40, generator=random).exp()
    second = 2 * first  # sequence by sequence
    rows = [second.tolist(), first.tolist()]
    interval = bootstrap_statistic(rows, lambda means: means[0] / means[1])
    assert interval == pytest.approx((2, 2))
    assert bootstrap_statistic([[1.0], [2.0]], lambda means: means[0]) is None


def test_equal_models_differ_by_nothing() -> None:
    torch.manual_seed(0)
    logits = 10 * torch.randn(2, 9, 300)
    quality = compare(logits, logits.clone(), torch.randint(0, 300, (2, 9)))
    assert quality.kl_per_sequence == (0.0, 0.0) and quality.nll == quality.reference_nll


@settings(max_examples=25, deadline=None)
@given(values=st.lists(st.floats(0, 100), min_size=2, max_size=20))
def test_the_interval_lies_within_the_values(values: list[float]) -> None:
    interval = bootstrap_interval(values)
    assert interval is not None
    assert min(values) - 1e-9 <= interval[0] <= interval[1] <= max(values) + 1e-9


def test_what_cannot_be_measured_is_said() -> None:
    with pytest.raises(InputError, match="no text"):
        QualityMeter().result()
    meter = QualityMeter()
    meter.add(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, 3), torch.zeros(1, 4, 3))
    assert meter.result().kl_interval is None
    with pytest.raises(InputError, match="one length"):
        meter.add(torch.zeros(1, 5, dtype=torch.long), torch.zeros(1, 5, 3), torch.zeros(1, 5, 3))
    with pytest.raises(FloatingPointError):
        broken = torch.full((1, 4, 3), math.nan)
        meter.add(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, 3), broken)
    with pytest.raises(FloatingPointError):
        perplexity(math.nan)
