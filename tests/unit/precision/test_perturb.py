"""The errors of the codec, in the layout in which the runtime stores weights."""

import pytest
import torch

from lib.blocks import partition_model, unique_parameters
from lib.codecs.storage import stored_bytes, stored_form, weight_form
from lib.errors import InputError
from lib.precision.perturb import curve_precisions, lossy_blocks, perturb, round_trip, weight_error
from lib.precision.quality import measure_perturbations
from lib.signals.summary import causal_logits
from lib.tiering import attach
from lib.tiering.planning.needs import make_payloads
from lib.vocabulary import Precision
from tests.tiny_models import tiny_gpt2, tiny_mixtral


@pytest.mark.parametrize("make_model", [tiny_gpt2, tiny_mixtral])
@pytest.mark.parametrize("precision", [Precision.INT8, Precision.INT3])
def test_perturbed_logits_are_those_of_the_runtime(make_model, precision, tmp_path) -> None:
    model = make_model().eval()
    ids = torch.randint(0, 40, (2, 24))
    names = [block.name for block in lossy_blocks(model, precision)]
    with torch.no_grad(), perturb(model, dict.fromkeys(names, precision)):
        expected = causal_logits(model, ids)
    with attach(
        model,
        None,
        budget={"HBM": None, "SSD": None},
        precision=precision,
        mode="real",
        spill_dir=tmp_path,
    ):
        held = causal_logits(model, ids)
    # Kernels round activations to bfloat16: far less than the weights' own error.
    with torch.no_grad():
        error = (expected - causal_logits(model, ids)).norm()
    assert (held - expected).norm() < (0.6 if precision == Precision.INT8 else 0.05) * error


@pytest.mark.parametrize("make_model", [tiny_gpt2, tiny_mixtral])
def test_leaving_restores_every_bit(make_model) -> None:
    model = make_model()
    before = {name: value.detach().clone() for name, value in unique_parameters(model).items()}
    blocks = {block.name: Precision.INT2 for block in partition_model(model)}
    with pytest.raises(KeyError), perturb(model, blocks):
        assert any(not torch.equal(v, before[n]) for n, v in unique_parameters(model).items())
        raise KeyError
    for name, value in unique_parameters(model).items():
        assert torch.equal(value, before[name])


def test_an_expert_alone_is_perturbed() -> None:
    model = tiny_mixtral()
    block = next(b for b in partition_model(model) if b.name.endswith("experts.2"))
    piece = block.pieces[0]
    parameter = unique_parameters(model)[piece.parameter]
    before = parameter.detach().clone()
    error = weight_error(model, piece.parameter, Precision.INT4)
    assert error is not None
    with perturb(model, {block.name: Precision.INT4}):
        changed = (parameter != before).flatten(1).any(1)
        assert changed.tolist() == [False, False, True, False]
        assert torch.allclose(parameter[2] - before[2], error[2], atol=1e-7)


def test_transposed_weights_are_grouped_along_their_inputs() -> None:
    model = tiny_gpt2()
    owner = model.transformer.h[0].mlp.c_fc  # Conv1D: (in, out)
    form = stored_form("weight", owner.weight, owner, Precision.INT4)
    assert form is not None and form.transposed
    assert (form.record.rows, form.record.cols) == (64, 16)
    with torch.no_grad():
        owner.weight[:, 5] = 0.25  # one output's inputs: a group, hence exact
    decoded = round_trip(owner.weight, form)
    assert decoded.shape == owner.weight.shape
    assert torch.equal(decoded[:, 5], owner.weight[:, 5])


def test_routers_stay_raw() -> None:
    model = tiny_mixtral()
    router = "model.layers.0.mlp.gate.weight"
    assert weight_form(model, router, Precision.INT2) is None
    names = {block.name for block in lossy_blocks(model, Precision.INT2)}
    assert "model.layers.0.mlp" not in names and "model.layers.0.mlp.experts.0" in names
    for name, rows, raw in [
        ("layers.0.mlp.gate.weight", 8, True),
        ("layers.0.mlp.gate.wg.weight", 8, True),
        ("layers.0.router.layer.weight", 8, True),
        ("layers.0.mlp.gate_proj.weight", 8, False),
        ("layers.0.attn.gate.weight", 64, False),  # as many outputs as inputs: no choice of experts
    ]:
        owner = torch.nn.Linear(64, rows, bias=False)
        form = stored_form(name, owner.weight, owner, Precision.INT4)
        assert (form is None) == raw, name


def test_vectors_and_native_weights_have_no_error() -> None:
    model = tiny_gpt2()
    assert weight_error(model, "transformer.h.0.ln_1.weight", Precision.INT2) is None
    assert weight_error(model, "transformer.wte.weight", Precision.FP32) is None
    half = tiny_gpt2().to(torch.bfloat16)
    assert weight_error(half, "transformer.wte.weight", Precision.BF16) is None
    assert curve_precisions(half)[0] == Precision.INT8
    assert curve_precisions(model)[0] == Precision.BF16


@pytest.mark.parametrize("make_model", [tiny_gpt2, tiny_mixtral])
@pytest.mark.parametrize("precision", [Precision.BF16, Precision.INT8, Precision.INT3])
def test_bytes_are_those_of_the_runtime(make_model, precision) -> None:
    model = make_model()
    blocks = partition_model(model)
    payloads = make_payloads(model, blocks, precision=precision, floors={})
    stored = sum(part.num_bytes for payload in payloads.values() for part in payload.parts)
    assert sum(stored_bytes(model, block, precision) for block in blocks) == stored


def test_unknown_blocks_are_refused() -> None:
    with (
        pytest.raises(InputError, match="not a block"),
        perturb(tiny_gpt2(), {"h.9": Precision.INT4}),
    ):
        pass


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = tiny_gpt2().eval()
    ids = torch.randint(0, 40, (2, 24))
    with torch.no_grad():
        before = causal_logits(model, ids)
    names = [block.name for block in partition_model(model)]
    choices = [{}, *({name: p for name in names} for p in (Precision.INT8, Precision.INT3))]
    none, fine, coarse = measure_perturbations(model, ids.split(1), choices)
    assert none.kl_nats == 0 and none.top1_agreement == 1 and none.nll == none.reference_nll
    assert 0 < fine.kl_nats < coarse.kl_nats
    with torch.no_grad():
        assert torch.equal(causal_logits(model, ids), before)
