from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from signal_models import VOCABULARY, Bigram, ToyLM, token_batches, toy_lm
from torch import Tensor, nn

from lib.blocks import parameter_digest, partition_model, unique_parameters
from lib.errors import InputError
from lib.hints import hints_to_json
from lib.signals import FisherResult, fisher_hints, measure_fisher, save_fisher_diagonal


def log_probabilities(model: nn.Module, ids: Tensor) -> Tensor:
    output = model(input_ids=ids)
    logits = output if isinstance(output, Tensor) else output.logits
    return logits.log_softmax(-1)


def exact_diagonal(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Compute the Fisher diagonal by its definition: every label of every position."""
    model.eval()
    parameters = unique_parameters(model)
    exact = {name: torch.zeros_like(p) for name, p in parameters.items()}
    log_p = log_probabilities(model, ids)
    for row, position in product(range(ids.shape[0]), range(ids.shape[1])):
        for label in range(log_p.shape[-1]):
            value = log_p[row, position, label]
            gradients = torch.autograd.grad(
                value, list(parameters.values()), retain_graph=True, allow_unused=True
            )
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    exact[name] += value.detach().exp() * gradient.square() / ids.numel()
    return exact


def exact_trace(model: nn.Module, ids: Tensor) -> dict[str, float]:
    diagonal = exact_diagonal(model, ids)
    return {
        block.name: sum(
            (diagonal[p.parameter] if p.expert is None else diagonal[p.parameter][p.expert])
            .sum()
            .item()
            for p in block.pieces
        )
        for block in partition_model(model)
    }


def assert_within_error(result: FisherResult, exact: dict[str, float]) -> None:
    assert result.trace_stderr is not None
    for name, value in exact.items():
        assert abs(result.trace[name] - value) < 4 * result.trace_stderr[name], name
        assert result.trace_stderr[name] < 0.15 * value, "the test would see nothing"


@pytest.mark.parametrize("batch", [1, 3])
def test_sampled_labels_are_unbiased_whatever_the_batch(batch: int) -> None:
    model = toy_lm()
    (ids,) = token_batches(1)
    exact = exact_trace(model, ids)
    draws = [part for _ in range(100) for part in ids.split(batch)]
    result = measure_fisher(model, draws, keep_diagonal=True, seed=3)
    assert_within_error(result, exact)
    assert result.diagonal is not None
    diagonal = exact_diagonal(model, ids)
    measured = torch.cat([result.diagonal[name].flatten() for name in diagonal])
    expected = torch.cat([value.flatten() for value in diagonal.values()])
    assert torch.corrcoef(torch.stack([measured, expected]))[0, 1] > 0.99


def test_a_model_of_independent_positions_has_the_analytic_fisher() -> None:
    """Softmax logits: F_ii = f(row) p (1 - p), f the frequency of the row's token in the text."""
    torch.manual_seed(1)
    model = Bigram()
    ids = torch.arange(VOCABULARY).repeat(4)[None]
    probabilities = model.table.weight.detach().softmax(-1)
    result = measure_fisher(model, [ids] * 200, keep_diagonal=True)
    exact = probabilities * (1 - probabilities) / VOCABULARY
    assert_within_error(result, {"table": exact.sum().item()})
    assert result.diagonal is not None
    torch.testing.assert_close(
        result.diagonal["table.weight"], exact, rtol=0.5, atol=exact.max().item() / 5
    )


def test_data_labels_square_the_gradient_of_each_sequence() -> None:
    model = toy_lm()
    batches = token_batches()
    result = measure_fisher(model, batches, labels="data", keep_diagonal=True)
    model.eval()
    expected = torch.zeros_like(model.embed.weight)
    for ids in torch.cat(batches).split(1):
        log_p = log_probabilities(model, ids)[:, :-1]
        loss = -log_p.gather(2, ids[:, 1:, None]).sum()
        (gradient,) = torch.autograd.grad(loss, [model.embed.weight])
        expected += gradient.square()
    assert (result.tokens, result.sequences, result.draws, result.seed) == (24, 6, 6, None)
    assert result.diagonal is not None
    torch.testing.assert_close(result.diagonal["embed.weight"], expected / 24)


def test_sampled_labels_use_every_position() -> None:
    result = measure_fisher(toy_lm(), token_batches())
    assert (result.tokens, result.sequences, result.draws, result.seed) == (30, 6, 2, 0)


def test_the_trace_is_the_sum_of_the_diagonal_per_block() -> None:
    model = toy_lm()
    result = measure_fisher(model, token_batches(), keep_diagonal=True)
    assert result.diagonal is not None
    assert result.diagonal.keys() == unique_parameters(model).keys()
    for block in partition_model(model):
        parts = [
            result.diagonal[p.parameter]
            if p.expert is None
            else result.diagonal[p.parameter][p.expert]
            for p in block.pieces
        ]
        total = sum(part.sum().item() for part in parts)
        assert result.trace[block.name] == pytest.approx(total, rel=1e-5)


def test_frozen_weights_are_measured_and_the_model_is_left_as_it_was() -> None:
    model = toy_lm()
    reference = measure_fisher(model, token_batches())
    model.train()
    model.layers[0].mlp.eval()
    model.layers[1].requires_grad_(False)
    model.embed.weight.grad = torch.full_like(model.embed.weight, 7.0)
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    result = measure_fisher(model, token_batches())
    assert result.trace == reference.trace, "dropout or frozen weights changed the measurement"
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.layers[1].parameters()] == [False] * 5
    assert model.layers[0].mlp.weight.requires_grad and model.layers[0].mlp.weight.grad is None
    assert torch.equal(model.embed.weight.grad, torch.full_like(model.embed.weight, 7.0))
    assert torch.equal(torch.get_rng_state(), random_state)


def test_the_model_is_restored_after_an_error() -> None:
    model = toy_lm().train()
    model.requires_grad_(False)

    def batches() -> Iterator[Tensor]:
        yield from token_batches(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_fisher(model, batches())
    assert model.training and not any(p.requires_grad for p in model.parameters())


def test_autocast_and_no_grad_around_change_nothing() -> None:
    model = toy_lm()
    reference = measure_fisher(model, token_batches())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert measure_fisher(model, token_batches()).trace == reference.trace


def test_the_seed_decides_the_labels() -> None:
    model = toy_lm()
    first, again, other = (
        measure_fisher(model, token_batches(), seed=seed).trace for seed in (1, 1, 2)
    )
    assert first == again != other


def test_progress_counts_sequences() -> None:
    done: list[int] = []
    measure_fisher(toy_lm(), token_batches(), progress=done.append)
    assert done == [3, 3]


def test_hugging_face_models_tied_conv1d_and_packed_experts() -> None:
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        MixtralConfig,
        MixtralForCausalLM,
        PreTrainedModel,
    )

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
    models: list[PreTrainedModel] = [
        GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=8, **sizes)),
        MixtralForCausalLM(
            MixtralConfig(
                hidden_size=8,
                intermediate_size=8,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                num_local_experts=3,
                num_experts_per_tok=1,
                **sizes,
            )
        ),
    ]
    for model in models:
        result = measure_fisher(model, token_batches())
        assert result.trace.keys() == {block.name for block in partition_model(model)}
        assert all(value > 0 for name, value in result.trace.items() if "experts" not in name)
    experts = [value for name, value in result.trace.items() if "experts" in name]
    assert len(experts) == 3 and sum(experts) > 0


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ([], {}, "at least one batch"),
        ([torch.zeros(5, dtype=torch.long)], {}, "shape"),
        ([torch.zeros(1, 5)], {}, "integer token ids"),
        ([torch.zeros(0, 5, dtype=torch.long)], {}, "shape"),
        ([torch.zeros(2, 1, dtype=torch.long)], {"labels": "data"}, "at least 2 tokens"),
        (token_batches(1), {"labels": "gold"}, "allowed are sampled, data"),
    ],
)
def test_bad_text_is_refused(batches: list[Tensor], options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        measure_fisher(toy_lm(), batches, **options)


def test_tokens_outside_the_vocabulary_are_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=1, n_head=1, n_embd=4, vocab_size=5, bos_token_id=0, eos_token_id=0)
    with pytest.raises(InputError, match=r"token ids .* outside the model's vocabulary of 5"):
        measure_fisher(GPT2LMHeadModel(config), token_batches(1))


def test_weights_without_gradients_are_refused() -> None:
    model = toy_lm()
    model.layers[0].mlp.weight = nn.Parameter(
        torch.zeros(6, 6, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(InputError, match="'layers.0.mlp.weight' is quantized"):
        measure_fisher(model, token_batches())
    with pytest.raises(InputError, match="offloaded"):
        measure_fisher(ToyLM().to("meta"), token_batches())


@pytest.mark.parametrize("labels", ["sampled", "data"])
def test_corrupt_weights_are_an_error(labels: str) -> None:
    model = toy_lm()
    with torch.no_grad():
        model.layers[0].mlp.bias[0] = float("inf")
    with pytest.raises(FloatingPointError, match="logits aren't finite"):
        measure_fisher(model, token_batches(), labels=labels)


def test_overflowing_gradients_are_an_error() -> None:
    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor) -> Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * 1e30

    model = Bigram()
    model.table.register_forward_hook(lambda module, args, output: Steep.apply(output))
    with pytest.raises(FloatingPointError, match="gradient of 'table.weight' isn't finite"):
        measure_fisher(model, token_batches())


def test_hints_carry_the_measurement(tmp_path: Path) -> None:
    model = toy_lm()
    common: dict[str, Any] = {"model_id": "toy", "hbm_threshold": 0.3, "cpu_threshold": 0.8}
    trace = fisher_hints(measure_fisher(model, token_batches()), model, **common)
    result = measure_fisher(model, token_batches(), labels="data", keep_diagonal=True)
    diagonal = fisher_hints(result, model, **common, extra_provenance={"data": "toy"})
    assert trace.provenance["signal"] == "fisher_trace"
    assert (trace.provenance["labels"], trace.provenance["tokens"]) == ("sampled", 30)
    assert diagonal.provenance["signal"] == "fisher_diag"
    assert (diagonal.provenance["labels"], diagonal.provenance["data"]) == ("data", "toy")
    assert "biased" in diagonal.provenance["estimator"]
    document = hints_to_json(diagonal)
    total = sum(p.numel() for p in model.parameters())
    assert sum(block["params"] for block in document["blocks"].values()) == total
    assert diagonal.blocks["embed"].signals["fisher_trace"] == result.trace["embed"]
    with pytest.raises(InputError, match="another model"):
        fisher_hints(result, Bigram(), **common)

    digest = parameter_digest(model)
    save_fisher_diagonal(result, tmp_path / "new" / "f.safetensors", parameter_digest=digest)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["f.safetensors"]
    with safe_open(tmp_path / "new" / "f.safetensors", framework="pt") as file:
        assert file.metadata() == {
            "signal": "fisher_diag",
            "labels": "data",
            "tokens": "24",
            "parameter_digest": digest,
        }
        assert result.diagonal is not None
        for name, value in result.diagonal.items():
            assert torch.equal(file.get_tensor(name), value)


def test_a_diagonal_that_was_not_kept_can_not_be_saved(tmp_path: Path) -> None:
    result = measure_fisher(toy_lm(), token_batches(1))
    assert result.trace_stderr is None, "one draw has no standard error"
    with pytest.raises(InputError, match="keep_diagonal"):
        save_fisher_diagonal(result, tmp_path / "f.safetensors", parameter_digest="")
