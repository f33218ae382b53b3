"""Counts of routed experts: exact, without a trace in what is computed, and in the hints."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from signal_models import token_batches, toy_lm
from tiny_models import tiny_mixtral
from torch import Tensor, nn
from transformers import GptOssConfig, GptOssForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from lib.hints import load_hints, save_hints
from lib.signals import RouterCounter, RouterCounts, collect_fisher, router_signals
from lib.signals.router import routed_ids

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 40,
}


def tiny_qwen3_moe() -> nn.Module:
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=8))


def tiny_gpt_oss() -> nn.Module:
    torch.manual_seed(0)
    return GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=4))


class ListedExperts(nn.Module):
    """A layer whose experts are modules, each called with its own tokens (N, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 3, bias=False)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, hidden: Tensor) -> Tensor:
        chosen = self.gate(hidden).argmax(-1)
        result = torch.zeros_like(hidden)
        for index, expert in enumerate(self.experts):
            if (chosen == index).any():
                result[chosen == index] = expert(hidden[chosen == index])
        return result


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(40, (3, 7), generator=torch.Generator().manual_seed(seed))


def hand_count(model: nn.Module, run: Callable[[], object]) -> dict[str, int]:
    """Count the ids that the routers return, with Python's own counter."""
    routers = {
        module: name.rpartition(".")[0]
        for name, module in model.named_modules()
        if name.endswith((".gate", ".router"))
    }
    counts = {f"{layer}.experts.{e}": 0 for layer in routers.values() for e in range(4)}

    def note(router: nn.Module, args: Any, output: Any) -> None:
        for expert, number in Counter(output[2].flatten().tolist()).items():
            counts[f"{routers[router]}.experts.{expert}"] += number

    hooks = [router.register_forward_hook(note) for router in routers]
    run()
    for hook in hooks:
        hook.remove()
    return counts


@pytest.mark.parametrize("make", [tiny_mixtral, tiny_qwen3_moe, tiny_gpt_oss])
def test_counts_are_those_of_the_routers_ids(make: Callable[[], nn.Module]) -> None:
    model = make().eval()
    with RouterCounter(model, training=False) as counter:
        expected = hand_count(model, lambda: [model(input_ids=tokens(seed)) for seed in range(2)])
    assert len(expected) == 8 and sum(expected.values()) == 2 * 2 * 21 * 2
    assert counter.fold() == expected
    assert counter.fold() == expected, "adding up twice counts nothing twice"
    model(input_ids=tokens())
    assert counter.fold() == expected, "the hooks are gone"
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_experts_in_a_list_are_counted_by_the_rows_that_they_get() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ModuleDict({"layer": ListedExperts()})["layer"])
    hidden = torch.randn(20, 6)
    with RouterCounter(model, training=False) as counter:
        model(hidden)
    chosen = model[1].gate(model[0](hidden)).argmax(-1)
    counts = {name: count for name, count in counter.fold().items() if count}
    assert counts == {f"1.experts.{e}": n for e, n in Counter(chosen.tolist()).items()}


def test_padding_is_not_counted() -> None:
    model = tiny_qwen3_moe().eval()
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[0, :5] = mask[2, :2] = 0
    with RouterCounter(model, training=False) as counter:
        model(input_ids=tokens(), attention_mask=mask)
        assert sum(counter.fold().values()) == 2 * 2 * int(mask.sum())
        model.generate(tokens(), attention_mask=mask, max_new_tokens=3, do_sample=False)
    # The prompt once more, and the first two of the three new tokens, which are fed back.
    assert sum(counter.fold().values()) == 2 * 2 * (2 * int(mask.sum()) + 2 * 3)


def train(model: Any, *, steps: int = 3) -> list[float]:
    """Accumulate over two passes per step, evaluate after each; returns the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    model.train()
    for step in range(steps):
        ids = tokens(step)
        for half in ids.split(2):
            loss = model(input_ids=half, labels=half, output_router_logits=True).loss
            loss.backward()
            losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            model(input_ids=ids)
        model.train()
    return losses


def test_training_is_the_same_bit_for_bit_and_evaluations_are_not_counted() -> None:
    plain, counted = tiny_mixtral(), tiny_mixtral()
    with RouterCounter(counted, training=True) as counter:
        losses = train(counted)
    assert losses == train(plain)
    for one, other in zip(plain.parameters(), counted.parameters(), strict=True):
        assert torch.equal(one, other)
    assert sum(counter.fold().values()) == 2 * 3 * 21 * 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_gradient_checkpointing_computes_again_is_counted_once(reentrant: bool) -> None:
    model: Any = tiny_mixtral()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with RouterCounter(model, training=True) as counter:
        model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    assert sum(counter.fold().values()) == 2 * 21 * 2


def test_counts_continue_and_add_up_over_processes() -> None:
    model = tiny_mixtral().eval()
    with RouterCounter(model, training=False) as counter:
        model(input_ids=tokens())
    once = counter.fold()
    with RouterCounter(model, training=False, counts=once) as counter:
        model(input_ids=tokens())
    # Two processes that saw the same: what was counted before is not doubled.
    assert counter.fold(lambda counts: 2 * counts) == {name: 3 * n for name, n in once.items()}


def test_ids_of_other_processes_experts_are_left_out() -> None:
    model: Any = tiny_mixtral()
    experts = model.model.layers[0].mlp.experts
    experts.forward = lambda hidden, ids, weights: hidden
    with RouterCounter(model, training=False) as counter:
        experts(torch.zeros(2, 16), torch.tensor([[0, 4], [3, 4]]), torch.ones(2, 2))
    counts = counter.fold()
    assert {name: count for name, count in counts.items() if count} == {
        "model.layers.0.mlp.experts.0": 1,
        "model.layers.0.mlp.experts.3": 1,
    }


def test_a_failure_costs_the_counts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "scatter_add_", lambda *_: 1 / 0)
    model = tiny_mixtral().eval()
    with (
        RouterCounter(model, training=False) as counter,
        pytest.warns(UserWarning, match="experts could not be counted: ZeroDivisionError"),
    ):
        assert model(input_ids=tokens()).logits.isfinite().all()
    assert counter.fold() == {}


def test_experts_that_are_all_computed_have_no_counts() -> None:
    model = toy_lm().eval()
    with RouterCounter(model, training=False) as counter:
        model(token_batches()[0])
    assert counter.fold() == {}
    assert routed_ids((torch.zeros(2, 3),), {}) is None


def test_hints_of_a_measurement_carry_the_counts(tmp_path: Path) -> None:
    model = tiny_qwen3_moe().eval()
    hints = collect_fisher(model, tokens(), model_id="toy")
    expected = hand_count(model, lambda: model(input_ids=tokens()))
    counts = {
        name: hint.signals["router_counts"]
        for name, hint in hints.blocks.items()
        if "router_counts" in hint.signals
    }
    assert counts == expected and hints.provenance["router_counts"] == "while collecting"
    save_hints(hints, tmp_path / "hints.json")
    assert load_hints(tmp_path / "hints.json").blocks == hints.blocks


def test_the_signal_ranks_by_the_share_of_tokens() -> None:
    model = tiny_qwen3_moe().eval()
    found = RouterCounts().measure(model, tokens().split(1))
    expected = hand_count(model, lambda: model(input_ids=tokens()))
    assert {name: found.density[name] for name in expected} == {
        name: count / 21 for name, count in expected.items()
    }
    assert {found.density[name] for name in found.density.keys() - expected.keys()} == {1.0}
    assert {name: value for name, value in found.signals.items() if value} == router_signals(
        expected
    )
