"""A checkpoint with random weights on the disk, made in little memory, the same on every machine.

Every weight is N(0, 0.02), those of layer norms 1 + N(0, 0.02), biases included: a bias that got
lost shows. One safetensors file, written weight after weight; bf16 is rounded to nearest even.
"""

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lib.errors import InputError
from lib.files import write_text
from lib.units import MIB, format_bytes
from scripts.experiments.offload.shapes import GPT2_MEDIUM, NARROW, TOY, Shape

__all__ = ["GPT2_MEDIUM", "NARROW", "TOY", "make_checkpoint"]

_STD = 0.02
_CHUNK = 4 * MIB
"""Weights made at a time."""
_DTYPES = {"float32": ("F32", 4), "bfloat16": ("BF16", 2)}
"""Name in safetensors, and bytes of a weight."""


def make_checkpoint(shape: Shape, folder: Path) -> Path:
    """Return the folder of the checkpoint below ``folder``; write it if it isn't there.

    Raises InputError where the disk has no room.
    """
    digest = hashlib.sha256(json.dumps(asdict(shape)).encode()).hexdigest()[:12]
    target = folder / f"{shape.family}-{digest}"
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
    write_text(json.dumps(shape.config(), indent=2) + "\n", target / "config.json")
    return target


def _write_weights(shape: Shape, path: Path) -> None:
    """Write a safetensors file: length of the header, header, weights one after another."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    dtype, itemsize = _DTYPES[shape.dtype]
    end = 0
    for name, rows, columns in shape.tensors():
        start, end = end, end + itemsize * rows * max(columns, 1)
        dimensions = [rows, columns] if columns else [rows]
        header[name] = {"dtype": dtype, "shape": dimensions, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for index, (name, rows, columns) in enumerate(shape.tensors()):
            random = np.random.default_rng([shape.seed, index])
            is_norm = ".ln_" in name or "norm." in name
            mean = 1.0 if is_norm and name.endswith("weight") else 0.0
            left = rows * max(columns, 1)
            while left:
                weights = random.standard_normal(min(left, _CHUNK), dtype=np.float32)
                weights *= _STD
                weights += mean
                file.write((_round_bf16(weights) if itemsize == 2 else weights).tobytes())
                left -= len(weights)
    partial.replace(path)


def _round_bf16(weights: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return the upper halves of finite fp32 numbers, rounded to nearest, ties to even."""
    bits = weights.view(np.uint32)
    rounded = bits + (((bits >> 16) & 1) + 0x7FFF)
    return (rounded >> 16).astype(np.uint16)
