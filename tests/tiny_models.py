"""Models of a few thousand weights, the same each time, that several test files use."""

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=2,
            n_embd=16,
            n_head=2,
            vocab_size=40,
            n_positions=32,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def tiny_llama() -> LlamaForCausalLM:
    """Rotary positions, and two query heads for each head of keys and values."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=40,
            max_position_embeddings=32,
            initializer_range=0.3,
        )
    )


def tiny_mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=4,
            vocab_size=40,
        )
    )


def tiny_qwen_moe(**options: int) -> Qwen3MoeForCausalLM:
    """Experts of which rows are whole vectors of activations (``options``: of its config)."""
    torch.manual_seed(0)
    sizes = {"num_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 3}
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            hidden_size=32,
            intermediate_size=32,
            moe_intermediate_size=32,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            vocab_size=40,
            max_position_embeddings=64,
            initializer_range=0.3,
            **{**sizes, **options},
        )
    )


def tiny_olmoe() -> OlmoeForCausalLM:
    torch.manual_seed(0)
    return OlmoeForCausalLM(
        OlmoeConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_experts=8,
            num_experts_per_tok=2,
            vocab_size=40,
            initializer_range=0.3,
            pad_token_id=0,
            eos_token_id=None,
        )
    )


def tiny_gpt_oss() -> GptOssForCausalLM:
    """Experts that are transposed, have biases, and rows of gate and up in turns."""
    torch.manual_seed(0)
    return GptOssForCausalLM(
        GptOssConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            num_local_experts=8,
            num_experts_per_tok=2,
            vocab_size=40,
            initializer_range=0.3,
            pad_token_id=0,
            eos_token_id=None,
        )
    )
