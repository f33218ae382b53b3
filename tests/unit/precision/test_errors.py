"""Errors of weights that are kept, and their products with gradients."""

import pytest
import torch

from lib.precision import errors as module
from lib.precision.errors import WeightErrors
from lib.precision.perturb import weight_error
from lib.vocabulary import Precision
from tests.tiny_models import tiny_mixtral

PACKED = "model.layers.0.mlp.experts.down_proj"
PRECISIONS = (Precision.INT6, Precision.INT3)


@pytest.mark.parametrize("keep_bytes", [0, 700, 2**30])
@pytest.mark.parametrize("per_expert", [True, False])
def test_products_are_those_of_the_codecs_error(
    keep_bytes: int, per_expert: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_WEIGHTS_AT_ONCE", 100)  # several parts
    model = tiny_mixtral()
    errors = WeightErrors(model, keep_bytes=keep_bytes)
    gradient = torch.randn(model.get_parameter(PACKED).shape)
    for _ in range(2):
        found = errors.products(PACKED, gradient, PRECISIONS, per_expert=per_expert)
        for precision in PRECISIONS:
            error = weight_error(model, PACKED, precision)
            assert error is not None
            product = (error * gradient).double()
            parts = product.flatten(1) if per_expert else product.flatten()
            linear, squared = found[precision]
            assert linear.shape == squared.shape == ((4,) if per_expert else ())
            torch.testing.assert_close(linear, parts.sum(-1), rtol=0.01, atol=1e-3)
            torch.testing.assert_close(squared, (parts**2).sum(-1), rtol=2e-3, atol=0)


def test_what_stays_raw_has_no_product() -> None:
    model = tiny_mixtral()
    errors = WeightErrors(model)
    norm = "model.norm.weight"
    assert errors.products(norm, torch.ones(16), PRECISIONS, per_expert=False) == {}
    assert not errors.squares(norm, Precision.INT3).any()


def test_squares_leave_what_is_kept_as_it_is() -> None:
    errors = WeightErrors(tiny_mixtral())
    first = errors.squares(PACKED, Precision.INT3).clone()
    assert torch.equal(errors.squares(PACKED, Precision.INT3), first) and first.sum() > 0
