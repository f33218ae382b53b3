"""Fisher information of cached keys and values against the KL that errors in them cause."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import tiny_gpt2, tiny_llama
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from lib.errors import InputError
from lib.signals.gradients import FisherLabels
from lib.signals.kv import collect_kv_fisher


def lively_gpt2() -> nn.Module:
    """A GPT-2 whose attention looks somewhere: fresh ones look everywhere alike."""
    model = tiny_gpt2()
    with torch.no_grad():
        for layer in model.transformer.h:
            layer.attn.c_attn.weight.mul_(20)
            layer.attn.c_proj.weight.mul_(20)
    return model


MODELS = [lively_gpt2, tiny_llama]


class NoisyLayer(DynamicLayer):
    """A cache that gives back keys and values with an error."""

    def __init__(self, keys: Callable[[Tensor], Tensor], values: Callable[[Tensor], Tensor]):
        super().__init__()
        self.errors = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        keys, values = super().update(key_states, value_states)
        return self.errors[0](keys), self.errors[1](values)


def add_noise(states: Tensor) -> Tensor:
    noise = torch.randn(states.shape, generator=torch.Generator().manual_seed(1))
    return states + 0.02 * noise


def measured_kl(model: Any, ids: Tensor, layer: int, *, keys: bool, values: bool) -> float:
    def same(states: Tensor) -> Tensor:
        return states

    layers = [
        NoisyLayer(add_noise if keys else same, add_noise if values else same)
        if index == layer
        else DynamicLayer()
        for index in range(2)
    ]
    with torch.no_grad():
        full = model(input_ids=ids, use_cache=False).logits.log_softmax(-1).double()
        noisy = model(input_ids=ids, past_key_values=Cache(layers=layers), use_cache=True).logits
        noisy = noisy.log_softmax(-1).double()
    return float((full.exp() * (full - noisy)).sum() / ids.numel())


@pytest.mark.parametrize("make_model", MODELS)
def test_predicted_damage_is_the_measured_kl(make_model: Callable[[], nn.Module]) -> None:
    model = make_model().eval()
    ids = torch.randint(40, (64, 12), generator=torch.Generator().manual_seed(2))
    draws = [ids] * 12  # the same text with fresh labels each time
    for layer in collect_kv_fisher(model, draws, round_trips={"noise": add_noise}):
        damage = layer.damage["noise"]
        for predicted, sides in (
            (damage.keys, {"keys": True, "values": False}),
            (damage.values, {"keys": False, "values": True}),
            (damage.total, {"keys": True, "values": True}),
            (damage.directional, {"keys": True, "values": True}),
        ):
            measured = measured_kl(model, ids, layer.layer, **sides)
            assert predicted == pytest.approx(measured, rel=0.25), (layer.layer, sides)


@pytest.mark.parametrize(("make_model", "kind"), [*zip(MODELS, ("attn", "self_attn"), strict=True)])
def test_traces_name_layers_and_repeat(make_model: Callable[[], nn.Module], kind: str) -> None:
    model = make_model().train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    ids = torch.randint(40, (4, 8), generator=torch.Generator().manual_seed(3))
    layers, again = (collect_kv_fisher(model, [ids], seed=5) for _ in range(2))
    assert layers == again
    assert [layer.layer for layer in layers] == [0, 1]
    assert all(
        layer.block.endswith("attn") and f".{layer.layer}." in layer.block for layer in layers
    )
    assert all(layer.trace == layer.keys_trace + layer.values_trace > 0 for layer in layers)
    assert model.training and not any(p.requires_grad for p in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_trace_does_not_depend_on_how_text_is_batched() -> None:
    model = lively_gpt2()
    ids = torch.randint(40, (256, 8), generator=torch.Generator().manual_seed(3))
    whole, split = (collect_kv_fisher(model, ids.split(size)) for size in (256, 32))
    for a, b in zip(whole, split, strict=True):
        assert a.trace == pytest.approx(b.trace, rel=0.2)  # other labels, the same expectation


def test_labels_of_the_text_give_one_trace_per_text() -> None:
    model = lively_gpt2()
    ids = torch.randint(40, (16, 8), generator=torch.Generator().manual_seed(3))
    whole, split = (
        collect_kv_fisher(model, ids.split(size), labels=FisherLabels.DATA, seed=size)
        for size in (16, 1)
    )
    sampled = collect_kv_fisher(model, [ids])
    for a, b, c in zip(whole, split, sampled, strict=True):
        assert a.keys_trace == pytest.approx(b.keys_trace, rel=1e-4)
        assert a.values_trace == pytest.approx(b.values_trace, rel=1e-4)
        assert a.trace != pytest.approx(c.trace, rel=1e-4)
    with pytest.raises(InputError, match="at least 2 tokens"):
        collect_kv_fisher(model, [ids[:, :1]], labels=FisherLabels.DATA)


def test_what_has_no_cache_is_refused() -> None:
    ids = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(InputError, match="attention in layers"):
        collect_kv_fisher(nn.Sequential(nn.Embedding(4, 4)), [ids])
    with pytest.raises(InputError, match="no text"):
        collect_kv_fisher(tiny_gpt2(), [])
    with pytest.raises(InputError, match="outside the model's vocabulary"):
        collect_kv_fisher(tiny_gpt2(), [ids + 40])
