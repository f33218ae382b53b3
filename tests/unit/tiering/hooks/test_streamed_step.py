"""Decoding steps of plans that stream weights, in pieces; what Inductor makes of them is tested in
test_compiled_decoding.py.
"""

import gc
import logging
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx import GraphModule
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lib.tiering import attach
from lib.tiering.hooks import surroundings
from lib.tiering.hooks.streamed_step import StreamedStep
from lib.tiering.runtime import Runtime

LAYERS = 4


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> list[GraphModule]:
    """Run pieces as they are, and return them."""
    modules: list[GraphModule] = []

    def take(module: GraphModule, inputs: list[Any]) -> GraphModule:
        modules.append(module)
        return module

    monkeypatch.setattr(surroundings, "compile_piece", take)
    return modules


def llama(*, tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1000,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=64, n_head=4, n_layer=LAYERS, vocab_size=500, n_positions=64, eos_token_id=None
    )
    config.pad_token_id = 0
    return GPT2LMHeadModel(config).eval()


def generate(model: Any, tokens: int = 6, batch: int = 2) -> list[list[int]]:
    ids = torch.arange(1, 1 + 5 * batch).view(batch, 5)
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        cache_implementation="static",
    )
    return [list(map(int, row)) for row in found]


def limit(runtime: Runtime, share: float) -> set[str]:
    """Give a runtime a share of what its weights take, or the least that does; returns what moves
    then.
    """
    size = int(runtime.plan.fast_bytes * share)
    while True:
        try:
            runtime.budget = {"HBM": size, "SSD": None}
        except ValueError:
            size += 8192
        else:
            return {group.name for group in runtime._keeper.residency.moving}


def is_compiled(runtime: Runtime) -> bool:
    decoding = runtime._forwards.around.decoding
    return decoding is not None and decoding._step is not None


@pytest.mark.parametrize(
    ("make", "share", "precision"),
    [
        (llama, 0.9, None),
        (llama, 0.4, "int4"),
        (lambda: llama(tied=False), 0.4, "bf16"),
        (lambda: llama(tied=False), 0.4, None),
        (gpt2, 0.7, "int4"),
        (gpt2, 0.4, None),
    ],
)
def test_tokens_are_the_same(make: Callable[[], Any], share: float, precision: str | None) -> None:
    model = make()
    with attach(model, budget={"HBM": None, "SSD": None}, precision=precision) as runtime:
        moving = limit(runtime, share)
        assert moving
        expected = generate(model)
        runtime.compile()
        runtime.reset_stats()
        assert generate(model) == expected and is_compiled(runtime)
        stats = runtime.stats()
        assert {name for name, block in stats.blocks.items() if block.bytes_moved} >= moving
        assert runtime._forwards.expected == runtime._forwards.schedule
        assert generate(model, batch=1) == [generate(model)[0]]


def test_layers_alike_are_one_piece(made: list[GraphModule]) -> None:
    model = llama()
    with attach(model, budget={"HBM": None, "SSD": None}) as runtime:
        assert 1 < len(limit(runtime, 0.7)) < 2 * LAYERS
        generate(model)
        runtime.compile()
        generate(model)
        decoding = runtime._forwards.around.decoding
        assert decoding is not None
        assert len(made) == len(decoding.streamed.compiled) < decoding.streamed.num_pieces
        before = len(made)
        generate(model)
        assert len(made) == before


@pytest.mark.parametrize("precision", [None, "int4"])
def test_another_plan_is_computed_with_and_not_traced_again(precision: str | None) -> None:
    model = llama()
    with attach(model, budget={"HBM": None, "SSD": None}, precision=precision) as runtime:
        full = runtime.plan.fast_bytes
        runtime.compile()
        found, moving = [], []
        torch._dynamo.utils.counters.clear()
        for share in (0.9, 0.75, 0.9):
            runtime.budget = {"HBM": int(full * share), "SSD": None}
            found.append(generate(model))
            assert is_compiled(runtime)
            moving.append({group.name for group in runtime._keeper.residency.moving})
        assert found[0] == found[1] == found[2] and moving[0] != moving[1]
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_an_embedding_that_leaves_is_computed_with_in_shards() -> None:
    model = llama()
    with attach(model, budget={"HBM": None, "SSD": None}, precision="int4") as runtime:
        assert "model.embed_tokens" not in limit(runtime, 0.9)
        expected = generate(model)
        runtime.compile()
        assert generate(model) == expected
        assert "model.embed_tokens" in limit(runtime, 0.5)
        assert generate(model) == expected and is_compiled(runtime)


def test_what_was_traced_keeps_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    # pytest keeps a test's log records until it ends, and torch's have what is traced in them.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    model = llama()
    with attach(model, budget={"HBM": None, "SSD": None}, precision="int4") as runtime:
        limit(runtime, 0.8)
        runtime.compile()
        generate(model)
        assert is_compiled(runtime)
        runtime.budget = {"HBM": int(runtime.plan.fast_bytes * 0.95), "SSD": None}
        memory = weakref.ref(runtime._keeper.memory)
        records = [
            weakref.ref(weight)
            for group in runtime._keeper.residency.groups.values()
            for weight in group.weights.compressed.values()
        ]
        assert records
    del runtime
    gc.collect()
    assert memory() is None and not any(record() for record in records)


def test_a_request_of_another_thread_waits_for_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    with attach(model, budget={"HBM": None, "SSD": None}, precision="int4") as runtime:
        smaller = {"HBM": int(runtime.plan.fast_bytes * 0.8), "SSD": None}
        limit(runtime, 0.9)
        expected = generate(model)
        plans, requests = [runtime.plan], runtime._forwards.requests

        def change() -> None:
            runtime.budget = smaller

        thread = threading.Thread(target=change)

        def take(module: GraphModule, inputs: list[Any]) -> Any:
            def run(*inputs: Any) -> Any:
                if not thread.ident:
                    thread.start()
                    while not requests._waiting:
                        time.sleep(0.001)
                    plans.append(runtime.plan)
                elif len(plans) == 2:
                    plans.append(runtime.plan)  # of the next piece
                return module(*inputs)

            return run

        monkeypatch.setattr(surroundings, "compile_piece", take)
        runtime.compile()
        assert generate(model) == expected
        thread.join()
        assert len(plans) == 3 and plans[0] is plans[1] is plans[2]
        assert runtime.budget == smaller


def test_what_cannot_be_compiled_runs_as_before_and_says_why_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = llama()
    with attach(model, budget={"HBM": None, "SSD": None}) as runtime:
        limit(runtime, 0.8)
        expected = generate(model)
        norm = model.model.layers[1].input_layernorm
        plain = norm.forward

        def forward(hidden_states: torch.Tensor) -> Any:
            torch._dynamo.graph_break()
            return plain(hidden_states)

        norm.forward = forward
        runtime.compile()
        with pytest.warns(RuntimeWarning, match="runs as before, since its step"):
            assert generate(model) == expected
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert generate(model) == expected
        assert not is_compiled(runtime)
        del norm.forward


def test_a_view_of_weights_that_outlives_its_module_is_not_cut() -> None:
    model = llama()
    layer = model.model.layers[1]
    gate = layer.mlp.gate_proj
    layer.mlp.forward = lambda x: gate.weight[:1]

    def forward(hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        view = layer.mlp(hidden_states)
        return layer.self_attn(hidden_states=hidden_states, **kwargs)[0] + view

    layer.forward = forward
    with attach(model, budget={"HBM": None, "SSD": None}) as runtime:
        limit(runtime, 0.8)
        expected = generate(model)
        runtime.compile()
        with pytest.warns(RuntimeWarning, match="can't be compiled: .* a view of weights"):
            assert generate(model) == expected
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert generate(model) == expected
        assert not is_compiled(runtime)


@pytest.mark.parametrize("where", ["backend", "cut"])
def test_an_interrupt_while_a_step_is_traced_leaves_it_to_the_next(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = {"backend": "__call__", "cut": "_cut"}[where]
    plain, left = getattr(StreamedStep, name), [1]

    def interrupted(self: StreamedStep, *args: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return plain(self, *args)

    model = llama()
    with attach(model, budget={"HBM": None, "SSD": None}) as runtime:
        limit(runtime, 0.8)
        expected = generate(model)
        runtime.compile()
        monkeypatch.setattr(StreamedStep, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert generate(model) == expected
        assert is_compiled(runtime)


def test_a_piece_that_inductor_refuses_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(module: GraphModule, inputs: list[Any]) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(surroundings, "compile_piece", refuse)
    model = llama()
    with attach(model, budget={"HBM": None, "SSD": None}) as runtime:
        limit(runtime, 0.8)
        expected = generate(model)
        runtime.compile()
        with pytest.warns(RuntimeWarning, match="no compiler") as warned:
            assert generate(model) == expected
        assert len([each for each in warned if "no compiler" in str(each.message)]) == 1


def test_emulated_time_is_not_compiled() -> None:
    model = llama()
    budget = {"HBM": None, "SSD": None}
    with attach(model, budget=budget, mode="emulated") as runtime:
        with pytest.warns(RuntimeWarning, match="isn't compiled under this plan: time is emulated"):
            runtime.compile()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            runtime.compile()
            generate(model)
        assert not is_compiled(runtime)
