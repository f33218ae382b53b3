"""One suite for every registered signal, those of ``$TIERHINTS_PLUGINS`` among them."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from lib.blocks import partition_model, unique_parameters
from lib.errors import InputError
from lib.hints import load_hints, save_hints
from lib.signals import (
    ElementwiseSignal,
    FisherTrace,
    Signal,
    fisher_hints,
    measure_fisher,
    register_signal,
    signal_hints,
)
from lib.signals.interface import SIGNALS

THRESHOLDS: Any = {"model_id": "toy", "hbm_threshold": 0.3, "cpu_threshold": 0.8}


class GradientNorm(ElementwiseSignal):
    """A signal of the tests: squared gradients of the text's own loss, batch by batch."""

    name = "gradient_norm"

    def values(self, model: nn.Module, batches: Iterable[Tensor]) -> Iterator[tuple[str, Tensor]]:
        parameters = unique_parameters(model)
        for batch in batches:
            loss = model(input_ids=batch, labels=batch).loss
            gradients = torch.autograd.grad(loss, list(parameters.values()))
            for name, gradient in zip(parameters, gradients, strict=True):
                yield name, gradient.square()


@pytest.fixture(params=[*SIGNALS, GradientNorm.name])
def kind(request: pytest.FixtureRequest) -> Iterator[type[Signal]]:
    with SIGNALS.restored():
        if request.param not in SIGNALS:
            register_signal(GradientNorm)
        yield SIGNALS[request.param]


def toy() -> tuple[GPT2LMHeadModel, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=16, vocab_size=30)
    return GPT2LMHeadModel(config).eval(), torch.randint(30, (5, 12)).split(2)


def test_every_block_gets_a_density(kind: type[Signal]) -> None:
    model, batches = toy()
    found = kind().measure(model, batches)
    blocks = {block.name for block in partition_model(model)}
    assert found.mass.keys() == found.density.keys() == blocks
    assert found.provenance["signal"] == kind.name
    known = [value for value in found.density.values() if value is not None]
    assert known and all(0 <= value < float("inf") for value in known)


def test_the_same_model_and_text_give_the_same(kind: type[Signal]) -> None:
    first, second = (kind().measure(*toy()) for _ in range(2))
    assert first == second


def test_the_model_stays_as_it_was(kind: type[Signal]) -> None:
    model, batches = toy()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    kind().measure(model, batches)
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.grad is None for value in model.parameters())
    assert all(value.requires_grad for value in model.parameters()) and not model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_progress_is_in_sequences(kind: type[Signal]) -> None:
    model, batches = toy()
    done: list[int] = []
    kind().measure(model, batches, progress=done.append)
    assert sum(done) in (0, 5)  # 0: it doesn't read the text


def test_hints_are_made_and_come_back_from_the_file(kind: type[Signal], tmp_path: Path) -> None:
    model, batches = toy()
    hints = signal_hints(
        kind().measure(model, batches), model, extra_provenance={"data": "x"}, **THRESHOLDS
    )
    save_hints(hints, tmp_path / "hints.json")
    assert load_hints(tmp_path / "hints.json") == hints
    assert hints.provenance["signal"] == kind.name and hints.provenance["data"] == "x"
    assert max(hint.importance or 0.0 for hint in hints.blocks.values()) == 1.0


def test_fisher_hints_are_those_of_the_registered_signal() -> None:
    model, batches = toy()
    expected = fisher_hints(measure_fisher(model, batches, seed=3), model, **THRESHOLDS)
    found = signal_hints(FisherTrace(seed=3).measure(model, batches), model, **THRESHOLDS)
    assert found.blocks == expected.blocks
    assert [*found.provenance] == [*expected.provenance]


def test_an_elementwise_signal_is_summed_by_block_and_over_batches() -> None:
    model, batches = toy()
    found = GradientNorm().measure(model, batches)
    squares = dict.fromkeys(unique_parameters(model), 0.0)
    for batch in batches:
        model(input_ids=batch, labels=batch).loss.backward()
        for name, value in unique_parameters(model).items():
            squares[name] += float(value.grad.square().sum())
        model.zero_grad()
    for block in partition_model(model):
        mass = sum(squares[piece.parameter] for piece in block.pieces)
        assert found.mass[block.name] == pytest.approx(mass, rel=1e-4)
        assert found.density[block.name] == pytest.approx(mass / block.num_params, rel=1e-4)
    assert (found.provenance["tokens"], found.provenance["sequences"]) == (60, 5)


def test_blocks_without_numbers_are_ranked_last() -> None:
    class HeadOnly(ElementwiseSignal):
        name = "head_only"

        def values(self, model: Any, batches: Any) -> Iterator[tuple[str, Tensor]]:
            yield "transformer.wte.weight", model.transformer.wte.weight.detach().abs()

    model, batches = toy()
    hints = signal_hints(HeadOnly().measure(model, batches), model, **THRESHOLDS)
    assert hints.blocks["transformer.wte"].rank == 1
    assert hints.blocks["transformer.ln_f"].importance is None


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("lm_head.weight", torch.ones(30, 16), "gave numbers of 'lm_head.weight': the model has"),
        ("transformer.wte.weight", torch.ones(30), r"shape \(30,\): give one for each weight"),
        ("transformer.wte.weight", -torch.ones(30, 16), "negative or not finite"),
        ("transformer.wte.weight", torch.full((30, 16), float("nan")), "negative or not finite"),
        (None, None, "signal wrong gave no numbers"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(name: Any, values: Any, message: str) -> None:
    class Wrong(ElementwiseSignal):
        name = "wrong"

        def values(self, model: Any, batches: Any) -> Iterator[tuple[str, Tensor]]:
            if given is not None:
                yield given

    given = None if name is None else (name, values)
    with pytest.raises(InputError, match=message):
        Wrong().measure(*toy())


def test_a_name_that_the_file_could_not_hold_is_refused() -> None:
    with pytest.raises(InputError, match="'My signal': a name has lower-case letters"):
        register_signal(type("Named", (GradientNorm,), {"name": "My signal"}))
