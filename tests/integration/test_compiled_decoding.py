"""runtime.compile(): decoding with a static cache in one graph."""

import functools
import gc
import shutil
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lib.codecs import ops
from lib.errors import PlacementError
from lib.tiering import attach

UNLIMITED = {"HBM": None, "SSD": None}


def small_llama(layers: int = 1) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.2,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def generate(model: Any, ids: torch.Tensor, **settings: Any) -> list[list[int]]:
    mask = torch.ones_like(ids)
    found = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, **settings)
    return [list(map(int, row)) for row in found]


def count_records() -> int:
    gc.collect()
    tensors = (each for each in gc.get_objects() if type(each) is torch.Tensor)
    return sum(each.dtype == torch.uint8 and each.numel() > 1000 for each in tensors)


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_decoding_compiles_to_the_same_tokens_and_leaves_no_trace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if ops.prepare("cpu") == "reference":
        pytest.skip("our kernels were not built")
    model, ids = small_llama(), torch.randint(1, 96, (2, 7))
    generate(model, ids, cache_implementation="static")  # which leaves its own marks
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    with attach(model, budget=UNLIMITED, precision="int4") as runtime:
        expected = generate(model, ids, cache_implementation="static")
        runtime.compile()
        steps: list[int] = []
        compiled = runtime._forwards.around.decoding
        assert compiled is not None
        assert generate(model, ids) == expected
        assert compiled._step is not None, "no step was compiled"
        step = compiled._step

        @functools.wraps(step)
        def count(**kwargs: Any) -> Any:
            steps.append(kwargs["input_ids"].shape[1])
            return step(**kwargs)

        monkeypatch.setattr(compiled, "_step", count)
        assert generate(model, ids) == expected and steps == [1] * 7
        # What differs from the call before is noticed, and what is like an earlier one again.
        alone = generate(model, ids[:1])
        assert alone == [generate(model, ids[:1], cache_implementation="dynamic")[0]]
        assert generate(model, ids) == expected
        steps.clear()  # another cache, another plan: nothing of the graph is used
        generate(model, ids, cache_implementation="dynamic")
        assert not steps
        runtime.budget = {"HBM": runtime.plan.fast_bytes - 1, "SSD": None}
        if runtime._keeper.residency.moving:
            assert generate(model, ids) == expected
            assert not steps and compiled._step not in (None, step)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert model.generation_config.cache_implementation is None


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_a_graph_that_is_not_needed_keeps_no_weights() -> None:
    if ops.prepare("cpu") == "reference":
        pytest.skip("our kernels were not built")
    model, ids, before = small_llama(), torch.randint(1, 96, (2, 7)), count_records()
    with attach(model, budget=UNLIMITED, precision="int4") as runtime:
        runtime.compile()
        generate(model, ids)
        assert count_records() > before
    del runtime
    assert count_records() == before


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_layers_that_stream_are_compiled_once_and_not_each() -> None:
    if ops.prepare("cpu") == "reference":
        pytest.skip("our kernels were not built")
    model, ids = small_llama(layers=6), torch.randint(1, 96, (2, 7))
    generate(model, ids, cache_implementation="static")  # which leaves its own marks
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    counters: Any = torch._dynamo.utils.counters
    with attach(model, budget=UNLIMITED, precision="int4") as runtime:
        full = runtime.plan.fast_bytes
        runtime.budget = {"HBM": int(full * 0.8), "SSD": None}
        moving = {group.name for group in runtime._keeper.residency.moving}
        assert 2 < len(moving) < 12, "some layers are to stream, and others to reside"
        expected = generate(model, ids, cache_implementation="static")
        runtime.compile()
        counters.clear()
        assert generate(model, ids) == expected
        decoding = runtime._forwards.around.decoding
        assert decoding is not None and decoding._step is not None
        assert counters["stats"]["unique_graphs"] == 1
        assert counters["aot_autograd"]["total"] == len(decoding.streamed.compiled)
        # The first layer's begin and the last one's end differ from the others.
        assert len(decoding.streamed.compiled) <= 6 < decoding.streamed.num_pieces
        counters.clear()
        assert generate(model, ids) == expected and not counters["stats"]
        runtime.budget = {"HBM": int(full * 0.75), "SSD": None}
        assert {group.name for group in runtime._keeper.residency.moving} != moving
        assert generate(model, ids) == expected and decoding._step is not None
        stats = runtime.stats()
        assert all(stats.blocks[name].bytes_moved for name in moving)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


def test_nothing_is_compiled_after_detach() -> None:
    runtime = attach(small_llama(), budget=UNLIMITED)
    runtime.detach()
    with pytest.raises(PlacementError, match="attach again"):
        runtime.compile()
