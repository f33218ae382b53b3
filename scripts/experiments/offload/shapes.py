"""The models that the benchmark makes: a GPT-2 for machines without a GPU, a Llama for those with.

A shape names every weight of a checkpoint in order, with its size, and the config.json beside it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

NamedSize = tuple[str, int, int]
"""Name, rows and columns of a weight; columns 0: a vector."""


def _count_weights(tensors: Iterable[NamedSize]) -> int:
    return sum(rows * max(columns, 1) for _, rows, columns in tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class GPT2Shape:
    """The sizes of a GPT-2 in fp32, whose embedding is the output head too."""

    family: ClassVar[str] = "gpt2"
    dtype: ClassVar[str] = "float32"

    layers: int
    width: int
    heads: int
    vocab_size: int
    context: int
    seed: int = 0

    def tensors(self) -> Iterator[NamedSize]:
        """Yield every weight in order."""
        width = self.width
        yield "transformer.wte.weight", self.vocab_size, width
        yield "transformer.wpe.weight", self.context, width
        for layer in range(self.layers):
            for name, rows, columns in (
                ("ln_1.weight", width, 0),
                ("ln_1.bias", width, 0),
                ("attn.c_attn.weight", width, 3 * width),
                ("attn.c_attn.bias", 3 * width, 0),
                ("attn.c_proj.weight", width, width),
                ("attn.c_proj.bias", width, 0),
                ("ln_2.weight", width, 0),
                ("ln_2.bias", width, 0),
                ("mlp.c_fc.weight", width, 4 * width),
                ("mlp.c_fc.bias", 4 * width, 0),
                ("mlp.c_proj.weight", 4 * width, width),
                ("mlp.c_proj.bias", width, 0),
            ):
                yield f"transformer.h.{layer}.{name}", rows, columns
        yield "transformer.ln_f.weight", width, 0
        yield "transformer.ln_f.bias", width, 0

    def num_bytes(self) -> int:
        """Return the bytes of the weights."""
        return 4 * _count_weights(self.tensors())

    def config(self) -> dict[str, Any]:
        """Return config.json; no token ends a text."""
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "n_layer": self.layers,
            "n_embd": self.width,
            "n_head": self.heads,
            "vocab_size": self.vocab_size,
            "n_positions": self.context,
            "bos_token_id": None,
            "eos_token_id": None,
            "dtype": self.dtype,
            "tie_word_embeddings": True,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaShape:
    """The sizes of a Llama with as many key as query heads and a head of its own."""

    family: ClassVar[str] = "llama"

    layers: int
    width: int
    inner: int
    heads: int
    vocab_size: int
    context: int
    dtype: str = "bfloat16"
    seed: int = 0

    def tensors(self) -> Iterator[NamedSize]:
        """Yield every weight in order."""
        width, inner = self.width, self.inner
        yield "model.embed_tokens.weight", self.vocab_size, width
        for layer in range(self.layers):
            for name, rows, columns in (
                ("self_attn.q_proj.weight", width, width),
                ("self_attn.k_proj.weight", width, width),
                ("self_attn.v_proj.weight", width, width),
                ("self_attn.o_proj.weight", width, width),
                ("mlp.gate_proj.weight", inner, width),
                ("mlp.up_proj.weight", inner, width),
                ("mlp.down_proj.weight", width, inner),
                ("input_layernorm.weight", width, 0),
                ("post_attention_layernorm.weight", width, 0),
            ):
                yield f"model.layers.{layer}.{name}", rows, columns
        yield "model.norm.weight", width, 0
        yield "lm_head.weight", self.vocab_size, width

    def num_bytes(self) -> int:
        """Return the bytes of the weights."""
        return {"bfloat16": 2, "float32": 4}[self.dtype] * _count_weights(self.tensors())

    def config(self) -> dict[str, Any]:
        """Return config.json; no token ends a text."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_hidden_layers": self.layers,
            "hidden_size": self.width,
            "intermediate_size": self.inner,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.context,
            "rms_norm_eps": 1e-6,
            "bos_token_id": None,
            "eos_token_id": None,
            "dtype": self.dtype,
            "tie_word_embeddings": False,
        }


Shape = GPT2Shape | LlamaShape

GPT2_MEDIUM = GPT2Shape(layers=24, width=1024, heads=16, vocab_size=50257, context=1024)
LLAMA_7B = LlamaShape(layers=32, width=4096, inner=11008, heads=32, vocab_size=32000, context=2048)
NARROW = LlamaShape(
    layers=30, width=64, inner=192, heads=4, vocab_size=4096, context=1024, dtype="float32"
)
"""As deep as a real model, with weights that cost no time: what is left is the cost of calls."""
TOY = GPT2Shape(layers=6, width=256, heads=4, vocab_size=4096, context=256)
"""For --quick: every part of the benchmark, in little time."""
TOY_LLAMA = LlamaShape(layers=6, width=512, inner=1376, heads=8, vocab_size=4096, context=256)
