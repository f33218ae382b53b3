"""The Fisher diagonal as a llama.cpp importance matrix (GGUF).

llama-quantize weights the rounding error of a matrix's input channel j by ``in_sum2[j] / counts``;
llama-imatrix makes that from squared activations, E[x_j²]. A weight's Fisher information is
F_ij ≈ E[g_i² x_j²], so

    in_sum2[j] = tokens · Σ_i F_ij        counts = tokens

puts the squared output gradients in as well. The format has one number per input channel, so what
differs between outputs of a matrix is lost. Keys as in tools/imatrix/imatrix.cpp.
"""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..hints import Identify, shorten_digest
from .gguf_names import GgufNames, import_gguf, is_quantizable
from .outline import Export, MatrixKind, Outline, Weight, list_some

FILE = "imatrix.gguf"
_LEAST = 1e-6
"""Channels without information count for this much of the tensor's mean: a group of zeros would
leave llama-quantize no scale to choose."""


def export_imatrix(outline: Outline, diagonal: Path, *, identify: Identify) -> Export:
    """Make imatrix.gguf from a file of tierhints collect --save-diagonal; ``identify``
    (``partial(parameter_digest, model)``) names the model's weights.

    Raises InputError for a file that is not a Fisher diagonal, or of other weights.
    """
    names = GgufNames(outline.model_type, outline.num_layers)
    entries: dict[str, NDArray[np.float32]] = {}
    unknown: list[str] = []
    file, tokens = _open_diagonal(diagonal, identify)
    with file:
        for weight in _unique_matrices(outline):
            tensors = names.find(weight)
            if not tensors:
                unknown.append(weight.name)
            elif any(is_quantizable(name, weight) for name in tensors):
                sums = _sum_outputs(_read(file, weight), weight, len(tensors))
                entries.update(zip(tensors, sums, strict=True))
    if not entries:
        raise InputError(f"no matrix of {outline.class_name} has a GGUF name that can be quantized")
    lost = [
        "differences between the outputs of a matrix: the format has one number per input",
        "importance of one matrix against another: llama-quantize weighs within each; that is what "
        "--to llama-cpp is for",
    ]
    if unknown:
        lost.append(f"{list_some(unknown)}: no GGUF tensor of that name")
    return Export(
        files={FILE: _to_gguf(entries, tokens, outline.provenance)},
        summary={"tensors": len(entries), "tokens": tokens},
        commands=(f"llama-quantize --imatrix {FILE} model-f16.gguf model.gguf Q4_K",),
        lost=tuple(lost),
    )


def _to_gguf(
    entries: Mapping[str, NDArray[np.float32]], tokens: int, provenance: Mapping[str, object]
) -> bytes:
    gguf = import_gguf()
    length = provenance.get("sequence_length")
    chunk = length if isinstance(length, int) and 0 < length <= tokens else tokens
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FILE
        writer = gguf.GGUFWriter(path, "imatrix")
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", [str(provenance.get("data", "Fisher information"))])
        writer.add_uint32("imatrix.chunk_count", tokens // chunk)
        writer.add_uint32("imatrix.chunk_size", chunk)
        for name, sums in entries.items():
            writer.add_tensor(f"{name}.in_sum2", np.float32(tokens) * sums)
            writer.add_tensor(f"{name}.counts", np.full((len(sums), 1), tokens, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def _open_diagonal(path: Path, identify: Identify) -> tuple[Any, int]:
    """Return the open file and the tokens it was measured on."""
    from safetensors import SafetensorError, safe_open

    try:
        file: Any = safe_open(path, framework="np")
        metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"Fisher diagonal {path} can't be read ({error}): make it with tierhints collect "
            "--save-diagonal"
        ) from error
    if metadata.get("signal") != "fisher_diag" or not metadata.get("tokens", "").isdigit():
        raise InputError(
            f"{path} is not a Fisher diagonal: make it with tierhints collect --save-diagonal"
        )
    made_for = metadata.get("parameter_digest", "")
    found = identify(made_for)
    if found != made_for:
        raise InputError(
            f"Fisher diagonal {path} was measured on other weights ({shorten_digest(made_for)}, "
            f"this model has {shorten_digest(found)}): collect it on this model"
        )
    return file, int(metadata["tokens"])


def _read(file: Any, weight: Weight) -> NDArray[np.float32]:
    if weight.name not in file.keys():  # noqa: SIM118 (a safetensors handle isn't a dict)
        raise InputError(f"the Fisher diagonal has no {weight.name!r}: collect it on this model")
    values: NDArray[np.float32] = file.get_tensor(weight.name)
    if values.shape != weight.shape or not np.isfinite(values).all() or (values < 0).any():
        raise InputError(
            f"the Fisher diagonal of {weight.name!r} has shape {values.shape} (expected "
            f"{weight.shape}), or values that aren't finite and 0 or more: collect it again"
        )
    return values


def _sum_outputs(
    values: NDArray[np.float32], weight: Weight, parts: int
) -> Iterator[NDArray[np.float32]]:
    """Yield Σ_i F_ij as (matrices, inputs), for each of the ``parts`` fused along the outputs."""
    by_columns = weight.layout in (MatrixKind.CONV1D, MatrixKind.EXPERTS_TRANSPOSED)
    matrices = values.reshape(-1, *values.shape[-2:])
    if by_columns:
        matrices = matrices.swapaxes(1, 2)
    for part in np.split(matrices, parts, axis=1):
        sums = part.sum(axis=1, dtype=np.float64)
        least = _LEAST * sums.mean() or 1.0
        yield np.maximum(sums, least).astype(np.float32)


def _unique_matrices(outline: Outline) -> Iterator[Weight]:
    """Yield each matrix once; the experts of a packed one share it."""
    seen: set[str] = set()
    for block in outline.blocks:
        for weight in block.weights:
            if weight.layout is not MatrixKind.OTHER and weight.name not in seen:
                seen.add(weight.name)
                yield weight
