"""Models of a few thousand weights, the same each time, that several test files use."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
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


def served_llama(**options: Any) -> LlamaForCausalLM:
    """Whose heads our attention over pages takes, with a vocabulary of 50; seed 0."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 50,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes | options)).eval()


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


class ListedMlp(nn.Module):
    """An expert as the models of remote code have it: Linear modules."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, width, bias=False)
        self.w2 = nn.Linear(width, width, bias=False)
        self.w3 = nn.Linear(width, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """(N, width) -> (N, width)."""
        output: Tensor = self.w2(F.silu(self.w1(hidden)) * self.w3(hidden))
        return output


class ListedMoe(nn.Module):
    """A router and a list of experts, as Mixtral had them. ``calls_all``: experts without tokens
    are called as well. ``routed`` keeps the ids (tokens, k) of each call.
    """

    def __init__(self, width: int, num_experts: int, top_k: int, *, calls_all: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(width, num_experts, bias=False)
        self.experts = nn.ModuleList(ListedMlp(width) for _ in range(num_experts))
        self.top_k = top_k
        self.calls_all = calls_all
        self.routed: list[list[list[int]]] = []

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, width) -> (B, T, width)."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        weights, ids = self.gate(flat).softmax(-1).topk(self.top_k)
        self.routed.append(ids.tolist())
        output = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            tokens, rank = (ids == number).nonzero(as_tuple=True)
            if self.calls_all or len(tokens):
                output.index_add_(0, tokens, expert(flat[tokens]) * weights[tokens, rank, None])
        return output.view_as(hidden)


def tiny_listed_moe(*, calls_all: bool = False) -> LlamaForCausalLM:
    """A Llama whose MLPs are mixtures with lists of experts: 2 layers of 8, 2 per token."""
    model = tiny_llama()
    for layer in model.model.layers:
        layer.mlp = ListedMoe(32, 8, 2, calls_all=calls_all)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mlp." in name:
                parameter.normal_(0, 0.3)
    return model
