"""The study's own signals: one batch's squared gradient, and caches by the moment of weights."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_gpt2

from lib.vocabulary import Precision
from scripts.experiments.study.caches import LOW, codec_errors, compare_caches, weight_traces
from scripts.experiments.study.measure import single_batch


def some_tokens(count: int = 6, length: int = 8) -> torch.Tensor:
    return torch.randint(40, (count, length), generator=torch.Generator().manual_seed(1))


def test_one_batch_is_the_squared_gradient_of_its_summed_loss() -> None:
    model, ids = tiny_gpt2().eval(), some_tokens()
    found = single_batch(model, ids)
    logits = model(input_ids=ids).logits[:, :-1]
    F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[name], parameter.grad.square() / (6 * 7))


def test_traces_of_keys_and_values_come_from_their_own_columns() -> None:
    model = tiny_gpt2()
    width = model.config.n_embd
    names = [name for name, _ in model.named_parameters() if name.endswith("c_attn.weight")]
    diagonal = {name: torch.zeros(width, 3 * width) for name in names}
    for layer, name in enumerate(names):
        diagonal[name][:, width : 2 * width] = 1 + layer
        diagonal[name][:, 2 * width :] = 10
    # A new norm has gamma 1 and beta 0: |x|^2 is the width.
    expected = [side for layer in range(len(names)) for side in ((1 + layer) * width, 10 * width)]
    assert weight_traces(model, diagonal) == pytest.approx(expected)


def test_cache_decisions_are_measured_against_the_true_fishers() -> None:
    model, ids = tiny_gpt2().eval(), some_tokens()
    errors = codec_errors(model, ids)
    assert len(errors) == 4 and all(e[LOW] > e[Precision.INT8] > 0 for e in errors)
    ones = {name: torch.ones_like(value) for name, value in model.named_parameters()}
    result = compare_caches(
        model,
        {"adam": ones, "fisher_true": ones},
        fisher_text=ids,
        fit_text=ids,
        judge_text=ids,
        batch_size=2,
        seed=0,
    )
    assert result["layers"] == 2
    for decision in ("keep_one", "keep_half", "mixed"):
        true = result[decision]["fisher_true"]
        assert true["over_true"] == true["same"] == 1
        assert result[decision]["weights_true"] == result[decision]["adam"]
        assert {"random", "reverse", "fisher_again"} <= result[decision].keys()
    assert result["keep_one"]["reverse"]["same"] == 0
    assert result["mixed"]["uniform"]["kl"] > 0
