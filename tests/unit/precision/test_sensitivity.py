"""Predicted KL against exact second-order theory, measurement, and an independent library."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lib.blocks import partition_model, unique_parameters
from lib.errors import InputError
from lib.precision.perturb import lossy_blocks, weight_error
from lib.precision.quality import measure_perturbations
from lib.precision.sensitivity import (
    diagonal_curves,
    find_violations,
    gradient_curves,
    magnitude_curves,
    monotone,
    random_curves,
)
from lib.signals import measure_fisher
from lib.signals.optimizers import corrected_moments
from lib.signals.summary import causal_logits
from lib.vocabulary import Precision
from tests.tiny_models import tiny_gpt2, tiny_mixtral

INTS = (Precision.INT8, Precision.INT4)


class Bigram(nn.Module):
    """Logits of the next token straight from a table, so that the Fisher matrix is known."""

    def __init__(self, size: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(size, size)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.table(input_ids)


def tokens(count: int, length: int, size: int = 32) -> Tensor:
    return torch.randint(0, size, (count, length), generator=torch.Generator().manual_seed(1))


def test_both_estimates_meet_the_exact_quadratic_form() -> None:
    model, ids = Bigram(), tokens(256, 64)
    error = weight_error(model, "table.weight", Precision.INT4)
    assert error is not None
    # F of a row's logits is diag(p) - p p', once for each time that the row is looked up.
    p = model.table.weight.detach().double().softmax(-1)
    frequency = torch.bincount(ids.flatten(), minlength=32).double() / ids.numel()
    full = 0.5 * frequency @ ((p * error**2).sum(-1) - (p * error).sum(-1) ** 2)
    diagonal = 0.5 * frequency @ ((p - p**2) * error**2).sum(-1)
    curves = gradient_curves(model, ids.repeat(4, 1).split(1), precisions=[Precision.INT4])
    for curve, stderr, exact in (
        (curves.directional, curves.directional_stderr, full),
        (curves.diagonal, curves.diagonal_stderr, diagonal),
    ):
        estimate, noise = curve["table"][Precision.INT4], stderr["table"][Precision.INT4]
        assert noise < 0.06 * exact
        assert abs(estimate - exact) < 4 * noise
    assert curves.draws == 1024 and curves.tokens == 4 * ids.numel()


def test_predictions_meet_the_measured_kl() -> None:
    model, ids = tiny_gpt2().eval(), tokens(64, 32, size=40)
    curves = gradient_curves(model, ids.repeat(8, 1).split(1), precisions=INTS)
    pairs = [(block.name, p) for block in lossy_blocks(model, INTS[0]) for p in INTS]
    measured = measure_perturbations(model, [ids], [{name: p} for name, p in pairs])
    for (name, precision), quality in zip(pairs, measured, strict=True):
        ratio = curves.directional[name][precision] / quality.kl_nats
        assert 0.7 < ratio < 1.4, (name, precision, ratio)


def test_a_stored_diagonal_gives_the_same_as_the_backward_passes() -> None:
    model, ids = tiny_mixtral().eval(), tokens(8, 16, size=40)
    curves = gradient_curves(model, ids.split(2), precisions=INTS, seed=3)
    result = measure_fisher(model, ids.split(2), keep_diagonal=True, seed=3)
    assert result.diagonal is not None
    stored = diagonal_curves(model, result.diagonal.items(), precisions=INTS)
    assert stored.keys() == {block.name for block in partition_model(model)}
    for name, curve in stored.items():
        for precision, value in curve.items():
            assert value == pytest.approx(curves.diagonal[name][precision], rel=1e-3, abs=1e-15)


def test_adam_moments_are_scaled_to_a_fisher_diagonal() -> None:
    model = tiny_gpt2()
    model.transformer.wpe.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99))
    for step in range(3):
        ids = tokens(4, 16, size=40) + step - step
        causal_logits(model, ids).logsumexp(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    moments = dict(corrected_moments(optimizer, model))
    name = "transformer.h.0.mlp.c_fc.weight"
    state = optimizer.state[unique_parameters(model)[name]]
    assert torch.allclose(moments[name], state["exp_avg_sq"] / (1 - 0.99**3))
    curves = diagonal_curves(model, moments.items(), scale=64.0, precisions=INTS)
    assert "transformer.wpe" not in curves  # frozen: no moment, hence no prediction
    expected = 0.0
    for part in ("c_fc", "c_proj"):
        weight = f"transformer.h.0.mlp.{part}.weight"
        error = weight_error(model, weight, Precision.INT4)
        assert error is not None
        expected += 0.5 * 64 * float((moments[weight] * error**2).sum())
    assert curves["transformer.h.0.mlp"][Precision.INT4] == pytest.approx(expected, rel=1e-5)
    assert curves["transformer.h.0.ln_1"] == {Precision.INT8: 0.0, Precision.INT4: 0.0}


def test_controls_know_nothing_of_the_loss() -> None:
    model = tiny_gpt2()
    magnitude = magnitude_curves(model, precisions=INTS)
    error = weight_error(model, "transformer.wpe.weight", Precision.INT4)
    assert error is not None
    expected = 0.5 * float(error.square().sum())
    assert magnitude["transformer.wpe"][Precision.INT4] == pytest.approx(expected, rel=1e-5)
    assert random_curves(model, seed=1) == random_curves(model, seed=1) != random_curves(model)


def test_violations_are_explained_and_mended() -> None:
    curve = {Precision.INT8: 2.0, Precision.INT6: 1.0, Precision.INT4: 3.0}
    assert list(monotone(curve).values()) == [2.0, 2.0, 3.0]
    (coarse,) = find_violations({"b": curve}, errors={"b": {**curve, Precision.INT6: 1.5}})
    assert (coarse.finer, coarse.coarser) == (Precision.INT8, Precision.INT6)
    assert "groups" in coarse.reason
    (noisy,) = find_violations(
        {"b": curve}, errors={"b": curve}, stderr={"b": dict.fromkeys(curve, 0.5)}
    )
    assert "standard errors" in noisy.reason
    rising = {"b": {Precision.INT8: 1.0, Precision.INT6: 4.0, Precision.INT4: 9.0}}
    (odd,) = find_violations({"b": curve}, errors=rising)
    assert "round better" in odd.reason


def test_a_diagonal_of_another_model_is_refused() -> None:
    with pytest.raises(InputError, match="another model"):
        diagonal_curves(tiny_gpt2(), [("transformer.wte.weight", torch.ones(3, 3))])


class _Classifier(nn.Module):
    """A language model as curvlinops wants it: a feed-forward map from inputs to class scores."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.first, self.second = model.first, model.second

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class _Mlp(nn.Module):
    """Each token's logits from its own one-hot code alone, so that positions are independent."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(32, 64, bias=False), nn.Linear(64, 32, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        one_hot = nn.functional.one_hot(input_ids, 32).float()
        return self.second(torch.tanh(self.first(one_hot)))


def test_the_fisher_of_curvlinops_agrees() -> None:
    curvlinops = pytest.importorskip("curvlinops")
    model, ids = _Mlp(), tokens(64, 16)
    curves = gradient_curves(model, ids.repeat(16, 1).split(1), precisions=[Precision.INT3])
    classifier = _Classifier(model)
    one_hot = nn.functional.one_hot(ids.flatten(), 32).float()
    parameters = [classifier.first.weight, classifier.second.weight]
    # For softmax cross-entropy the generalised Gauss-Newton matrix is the Fisher matrix.
    fisher = curvlinops.GGNLinearOperator(
        classifier,
        nn.CrossEntropyLoss(),
        parameters,
        [(one_hot, ids.flatten())],
    )
    for index, name in enumerate(("first", "second")):
        errors = [torch.zeros_like(value) for value in parameters]
        error = weight_error(model, f"{name}.weight", Precision.INT3)
        assert error is not None
        errors[index] = error
        vector = torch.cat([value.flatten() for value in errors])
        exact = 0.5 * float(vector @ (fisher @ vector))
        noise = curves.directional_stderr[name][Precision.INT3]
        assert noise < 0.06 * exact
        assert abs(curves.directional[name][Precision.INT3] - exact) < 4 * noise
