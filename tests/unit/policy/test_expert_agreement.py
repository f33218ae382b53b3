"""The simulator's cache and the engine's are one object: on the same routing, the same counters."""

from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from lib.evaluation.record_routing import record_routing
from lib.policy.experts import POLICIES, ExpertCache
from lib.policy.experts.judge import replay
from lib.tiering import attach

EXPERT_BYTES = 3 * 16 * 64 * 4
NUM_EXPERTS = 2 * 8


def small_mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            hidden_size=16,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=8,
            vocab_size=40,
        )
    ).eval()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("slots", [3, 8])
def test_the_simulator_counts_what_the_engine_counts(
    policy: str, slots: int, tmp_path: Path
) -> None:
    model = small_mixtral()
    model.generation_config.eos_token_id = None
    weights = sum(parameter.numel() * 4 for parameter in model.parameters())
    budget = weights - NUM_EXPERTS * EXPERT_BYTES + (slots + 1) * EXPERT_BYTES
    prompts = torch.randint(1, 40, (3, 20), generator=torch.Generator().manual_seed(1))
    with attach(
        model, budget={"HBM": budget, "SSD": None}, spill_dir=tmp_path, look_ahead=False
    ) as runtime:
        experts = runtime._keeper.residency.experts
        experts.policy = policy
        record_routing(model, prompts[:1], new_tokens=2)  # the plan may change after a forward
        experts.free()
        experts.adopt(runtime.plan)
        assert experts.cache is not None
        runtime.reset_stats()
        trace = record_routing(model, prompts, new_tokens=12)
        engine, sizes = experts.cache.counters, experts.cache.sizes
        cache = ExpertCache(
            sizes,
            experts.cache.capacity_bytes,
            per_token=trace.per_token,
            policy=policy,
            counts={} if policy == "popularity" else None,
            spare=policy == "ours",
        )
        stats = runtime.stats().experts
    replay(trace.calls(), cache)
    assert engine.misses > 0
    assert engine.hits > 0 or slots == 3  # below what a token uses
    assert cache.counters == engine
    assert stats is not None
    assert (stats.resident, stats.reads, stats.predicted) == (engine.hits, engine.misses, 0)
