"""export(): hints in the format of a tool, from the model they are for; torch only where needed."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import InputError
from ..files import check_writable, write_bytes
from ..hints import Hints, Identify, load_hints
from .device_map import export_device_map
from .imatrix import export_imatrix
from .llama_cpp import export_llama_cpp
from .outline import Export, Outline
from .torchao_config import export_torchao
from .vllm import export_vllm

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """What the exporters may be told; ``fisher`` is a file, ``identify`` names the weights."""

    device: str
    bits: float | None
    fisher: Path | None
    identify: Identify


def _imatrix(outline: Outline, asked: _Asked) -> Export:
    assert asked.fisher is not None
    return export_imatrix(outline, asked.fisher, identify=asked.identify)


_EXPORTS: dict[str, Callable[[Outline, _Asked], Export]] = {
    "accelerate": lambda outline, asked: export_device_map(outline, device=asked.device),
    "torchao": lambda outline, asked: export_torchao(outline, device=asked.device, bits=asked.bits),
    "llama-cpp": lambda outline, asked: export_llama_cpp(outline, bits=asked.bits),
    "vllm": lambda outline, asked: export_vllm(outline),
    "imatrix": _imatrix,
}
TOOLS = tuple(_EXPORTS)
DEVICES = ("cuda", "cpu")
_WITH_BITS = ("torchao", "llama-cpp")


def export(
    hints: Hints | str | Path,
    model: "nn.Module | str | Path | None" = None,
    *,
    to: str,
    output: str | Path | None = None,
    device: Literal["cuda", "cpu"] | str = "cuda",
    bits: float | None = None,
    fisher: str | Path | None = None,
) -> Export:
    """Turn hints into the files of another tool; returns them with what the tool can't express.

    ``to``: accelerate, torchao, llama-cpp, vllm or imatrix. ``model``: the one that the hints are
    for, an nn.Module, a folder or a hub id (default: the folder that the hints name). Of a
    safetensors folder samples are read, to see that the hints are its own. ``output``:
    a folder to write the files into; without it nothing is written. ``device`` is what will compute
    and need not be here (accelerate, torchao). ``bits``: mean bits per quantized weight, scales
    included (torchao, llama-cpp; default: the floors if every block has one, else the mean of the
    format's steps). ``fisher``: the diagonal that ``collect_fisher(diagonal=)`` wrote (imatrix).

    Raises InputError for another model's hints, for options that the tool has no use for, and for
    what it can't hold at all.
    """
    _check_options(to, device=device, bits=bits, fisher=fisher)
    if output is not None:
        check_writable(Path(output) / "file")
    if not isinstance(hints, Hints):
        hints = load_hints(hints)
    outline, identify = _read_outline(_model_of(hints) if model is None else model, hints)
    asked = _Asked(
        device=device, bits=bits, fisher=None if fisher is None else Path(fisher), identify=identify
    )
    exported = _EXPORTS[to](outline, asked)
    if output is not None:
        for name, content in exported.files.items():
            data = content if isinstance(content, bytes) else content.encode()
            write_bytes(data, Path(output) / name)
    return exported


def _check_options(to: str, *, device: str, bits: float | None, fisher: str | Path | None) -> None:
    """Raise InputError for options that don't go together, before a model is read."""
    if to not in TOOLS:
        raise InputError(f"no export to {to!r}: give one of {', '.join(TOOLS)}")
    if device not in DEVICES:
        raise InputError(f"device {device!r} is unknown: give {' or '.join(DEVICES)}")
    if (fisher is None) == (to == "imatrix"):
        raise InputError(
            "a Fisher diagonal (fisher, --fisher FILE) goes with imatrix, and only with it: make "
            "the file with collect_fisher(diagonal=) or tierhints collect --save-diagonal"
        )
    if bits is not None:
        if to not in _WITH_BITS:
            raise InputError(f"bits go with {' or '.join(_WITH_BITS)}, not {to}: leave them out")
        if not (math.isfinite(bits) and 0 < bits <= 32):
            raise InputError(f"bits {bits} are out of range: give more than 0, at most 32")


def _model_of(hints: Hints) -> str:
    name = hints.model.id if hints.model else ""
    if not (Path(name) / "config.json").is_file() or not name:
        raise InputError(
            f"the hints' model {name!r} is not a folder here: give its checkpoint with --model "
            "(model=)"
        )
    return name


def _read_outline(model: "nn.Module | str | Path", hints: Hints) -> tuple[Outline, Identify]:
    """Return the outline of a model whose weights are those of the hints, and what names them."""
    from ..blocks import parameter_digest
    from ..checkpoint.models import load_model
    from .model import outline_model

    found = None
    if isinstance(model, str | Path):
        name = str(model)
        found = _open_checkpoint(name)
        if found is None:  # a hub id, pickled weights, or names that transformers converts
            model = load_model(name)
    if found is None:
        assert not isinstance(model, str | Path)
        found = model, partial(parameter_digest, model)
    whole, identify = found
    return outline_model(whole, hints, identify=identify), identify


def _open_checkpoint(name: str) -> "tuple[nn.Module, Identify] | None":
    """Build the model without memory for its weights, which are sampled where they lie; None for a
    checkpoint that isn't safetensors of the model's own names.
    """
    from ..blocks import unique_parameters
    from ..checkpoint.load import load
    from ..checkpoint.source import CheckpointSource

    folder = Path(name)
    if not folder.is_dir() or not any(folder.glob("*.safetensors*")):
        return None
    model: Any = load(folder)
    names: dict[int, list[str]] = {}
    for parameter_name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(parameter_name)
    source = CheckpointSource(
        folder, base_model_prefix=model.base_model_prefix, tied=names.values()
    )
    own = sorted(unique_parameters(model))
    if not all(parameter in source for parameter in own):
        return None
    return model, partial(source.digest, own)
