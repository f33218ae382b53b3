"""A GPT-2 with random weights on the disk, made in little memory and the same on every machine.

Every weight is N(0, 0.02), those of layer norms 1 + N(0, 0.02), biases included: a bias that got
lost shows. The embedding is the output head too, as in GPT-2.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lib.errors import InputError
from lib.files import write_text
from lib.units import MIB, format_bytes

_STD = 0.02
_CHUNK = 4 * MIB
"""Weights made at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes of a GPT-2."""

    layers: int
    width: int
    heads: int
    vocab_size: int
    context: int
    seed: int = 0

    def num_bytes(self) -> int:
        """Return the bytes of the weights in fp32."""
        return sum(4 * rows * max(columns, 1) for _, rows, columns in self.tensors())

    def tensors(self) -> Iterator[tuple[str, int, int]]:
        """Yield name, rows and columns of every weight in order; columns 0: a vector."""
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


GPT2_MEDIUM = Shape(layers=24, width=1024, heads=16, vocab_size=50257, context=1024)
TOY = Shape(layers=6, width=256, heads=4, vocab_size=4096, context=256)
"""For --quick: every part of the benchmark, none of the waiting."""


def make_checkpoint(shape: Shape, folder: Path) -> Path:
    """Return the folder of the checkpoint below ``folder``; write it if it isn't there.

    Raises InputError where the disk has no room.
    """
    digest = hashlib.sha256(json.dumps(asdict(shape)).encode()).hexdigest()[:12]
    target = folder / f"gpt2-{digest}"
    if (target / "config.json").exists():  # written last
        return target
    target.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target).free
    if free < 1.1 * shape.num_bytes():
        raise InputError(
            f"{target} has {format_bytes(free)} free and the checkpoint takes "
            f"{format_bytes(shape.num_bytes())}: give another --work-dir"
        )
    _write_weights(shape, target / "model.safetensors")
    write_text(json.dumps(_config(shape), indent=2) + "\n", target / "config.json")
    return target


def _config(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": shape.layers,
        "n_embd": shape.width,
        "n_head": shape.heads,
        "vocab_size": shape.vocab_size,
        "n_positions": shape.context,
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": "float32",
        "tie_word_embeddings": True,
    }


def _write_weights(shape: Shape, path: Path) -> None:
    """Write a safetensors file: length of the header, header, weights one after another."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, rows, columns in shape.tensors():
        start, end = end, end + 4 * rows * max(columns, 1)
        dimensions = [rows, columns] if columns else [rows]
        header[name] = {"dtype": "F32", "shape": dimensions, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for index, (name, rows, columns) in enumerate(shape.tensors()):
            random = np.random.default_rng([shape.seed, index])
            mean = 1.0 if ".ln_" in name and name.endswith("weight") else 0.0
            left = rows * max(columns, 1)
            while left:
                weights = random.standard_normal(min(left, _CHUNK), dtype=np.float32)
                weights *= _STD
                weights += mean
                file.write(weights.tobytes())
                left -= len(weights)
    partial.replace(path)
