"""The load-balance loss: of each layer, over the whole batch, without gradients through counts."""

from typing import Any

import pytest
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from gpt2.balance import BalanceLoss, layer_balance
from gpt2.distributed import World
from gpt2.model import make_network
from lib.config import ModelConfig, MoeConfig

ONE = World(rank=0, size=1, device=torch.device("cpu"))
MODEL = ModelConfig(
    pretrained="",
    layers=2,
    heads=2,
    width=8,
    context=16,
    vocab_size=30,
    dropout=0.0,
    moe=MoeConfig(experts=4, top_k=2, expert_width=8, balance=0.01),
)


def test_even_use_costs_one_and_collapse_costs_the_number_of_experts() -> None:
    even = torch.eye(4) * 50
    assert float(layer_balance(even, even.topk(1).indices, ONE)) == pytest.approx(1)
    one = torch.tensor([[50.0, 0, 0, 0]] * 4)
    assert float(layer_balance(one, one.topk(1).indices, ONE)) == pytest.approx(4)


def test_one_layer_is_what_transformers_computes_over_top_k() -> None:
    logits = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    theirs: Any = load_balancing_loss_func((logits,), 4, 2)
    ours = layer_balance(logits, logits.topk(2).indices, ONE)
    assert float(ours) == pytest.approx(float(theirs) / 2)


def test_a_collapsed_layer_is_not_hidden_by_another() -> None:
    first, second = (torch.tensor([[50.0, 0]] * 4), torch.tensor([[0, 50.0]] * 4))
    pooled: Any = load_balancing_loss_func((first, second), 2, 1)
    ours = sum(layer_balance(x, x.topk(1).indices, ONE) for x in (first, second)) / 2
    assert float(pooled) == pytest.approx(1)
    assert float(ours) == pytest.approx(2)


def test_processes_average_to_the_loss_of_the_whole_batch() -> None:
    logits = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    ids = logits.topk(2).indices
    counts = torch.bincount(ids.flatten(), minlength=4).float()

    class Two(World):
        def add(self, tensor: torch.Tensor) -> torch.Tensor:
            return counts

    two = Two(rank=0, size=2, device=torch.device("cpu"))
    halves = [layer_balance(logits[rows], ids[rows], two) for rows in (slice(10), slice(10, 20))]
    assert float(sum(halves) / 2) == pytest.approx(float(layer_balance(logits, ids, ONE)))


def test_only_training_passes_count_and_gradients_reach_routers() -> None:
    torch.manual_seed(0)
    network = make_network(MODEL)
    balance = BalanceLoss(network, 0.01, ONE)
    ids = torch.randint(30, (2, 6))
    network.eval()(input_ids=ids)
    network.train()(input_ids=ids)
    loss = balance.take()
    assert loss.shape == () and loss >= 0.99
    loss.backward()
    assert all(layer.mlp.gate.weight.grad.abs().sum() > 0 for layer in network.model.layers)
