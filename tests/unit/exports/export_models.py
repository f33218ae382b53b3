"""Models, hints and outlines that the tests of the exports share."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from lib.blocks import parameter_digest, partition_model
from lib.exports import Outline
from lib.exports.model import outline_model
from lib.hints import BlockHint, Hints, ModelInfo
from lib.vocabulary import Precision, Tier

TIERS = (Tier.SSD, Tier.HBM, Tier.CPU)


def tiny_llama(hidden: int = 64, *, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=48,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
        )
    ).eval()


def tiny_llama_moe() -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            vocab_size=48,
        )
    ).eval()


def make_hints(
    model: torch.nn.Module,
    *,
    tiers: Sequence[Tier] = TIERS,
    kl: Mapping[str, Mapping[Precision, float]] | None = None,
    floors: Mapping[str, Precision] | None = None,
    flat: bool = False,
) -> Hints:
    """Hints with the tiers in turn, and importance that falls by a third from block to block."""
    blocks = {}
    for index, block in enumerate(partition_model(model)):
        blocks[block.name] = BlockHint(
            tier=tiers[index % len(tiers)],
            importance=None if flat else 0.67**index,
            rank=None if flat else index + 1,
            num_bytes=block.num_bytes,
            num_params=block.num_params,
            kl=(kl or {}).get(block.name, {}),
            floor=(floors or {}).get(block.name),
        )
    if flat:
        return Hints(blocks=blocks)
    info = ModelInfo(
        id="tiny",
        revision="",
        class_name=type(model).__name__,
        parameter_digest=parameter_digest(model),
    )
    provenance = {"signal": "fisher_diag", "created": "today", "sequence_length": 16}
    return Hints(blocks=blocks, model=info, provenance=provenance)


def outline_of(model: torch.nn.Module, **options: Any) -> Outline:
    return outline_model(
        model, make_hints(model, **options), identify=partial(parameter_digest, model)
    )
