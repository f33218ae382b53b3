"""A checkpoint as llama.cpp's GGUF file in fp32, for its quantizer to read.

As llama.cpp's own converter does it, for the two architectures of the benchmark and without a
tokenizer: the benchmark feeds token ids. Llama's queries and keys have their rows in another order
(rotations of neighbours, not of halves), GPT-2's matrices are transposed.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoConfig

from lib.errors import InputError
from lib.exports.gguf_names import import_gguf

_TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def write_gguf(checkpoint: Path, path: Path) -> None:
    """Write the file, unless it is there. Raises InputError for another architecture."""
    if path.exists():
        return
    gguf = import_gguf()
    config = AutoConfig.from_pretrained(checkpoint).to_dict()  # with what the file leaves out
    kind = config["model_type"]
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, kind)
    if kind == "llama":
        layers = _describe_llama(writer, config)
        arch = gguf.MODEL_ARCH.LLAMA
    elif kind == "gpt2":
        layers = _describe_gpt2(writer, config)
        arch = gguf.MODEL_ARCH.GPT2
    else:
        raise InputError(f"no GGUF file is made of a {kind}: give a llama or a gpt2")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(arch, layers)
    for name, weight in _read_weights(checkpoint):
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise InputError(f"gguf has no tensor for {name!r} of a {kind}")
        writer.add_tensor(found, _arrange(name, weight, config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(path)


def _describe_llama(writer: Any, config: dict[str, Any]) -> int:
    """Write the keys of a Llama; returns the number of layers."""
    rope = config["rope_parameters"]
    if rope["rope_type"] != "default":
        raise InputError(f"no GGUF file is made of a llama with {rope['rope_type']} rotations")
    heads = config["num_attention_heads"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    return int(config["num_hidden_layers"])


def _describe_gpt2(writer: Any, config: dict[str, Any]) -> int:
    """Write the keys of a GPT-2; returns the number of layers."""
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config.get("layer_norm_epsilon", 1e-5))
    return int(config["n_layer"])


def _read_weights(checkpoint: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    from safetensors import safe_open

    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (a safetensors handle isn't a dict)
                yield name, file.get_tensor(name).float().numpy()


def _arrange(name: str, weight: NDArray[np.float32], config: dict[str, Any]) -> NDArray[np.float32]:
    """Return a weight as llama.cpp has it."""
    if name.endswith(_TRANSPOSED):
        return np.ascontiguousarray(weight.T)
    for projection, heads in (
        ("q_proj.weight", "num_attention_heads"),
        ("k_proj.weight", "num_key_value_heads"),
    ):
        if name.endswith(projection):
            halves = weight.reshape(config[heads], 2, -1, weight.shape[1])
            return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)
    return weight
