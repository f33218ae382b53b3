"""Whether a checkpoint is the model's: what would compute wrong numbers is refused by name.

transformers decides some things from the checkpoint and not from config.json alone: what is tied,
dequantized, kept in fp32, which dtype the rest has, and how to generate. ``check_weights`` and
``separate_ties`` do as it does for a model that ``load`` builds; ``check_fit`` finds what a model
that was built by hand has otherwise.
"""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..files import parse_json
from .files import PLAIN_DTYPES
from .source import CheckpointSource

_CODES = {
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.uint32,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e8m0fnu,
}
"""What packed weights are stored as; int64 and bool are positions, counters and masks."""
_QUANTIZATION_KEYS = ("quantization_config", "compression_config")
_DEQUANTIZE = (
    "load it once with transformers (from_pretrained), call dequantize() on the model, "
    "save_pretrained() it to another folder, and give that one"
)
_PIECE_BYTES = 4 * 2**20
_MASK = re.compile(r"(^|\.)attn(\.attention)?\.(masked_)?bias$")
"""Causal masks that older GPT-2, GPT-Neo and GPT-J checkpoints have as buffers."""


def check_fit(model: nn.Module, source: CheckpointSource) -> None:
    """Check a checkpoint against a model that was built without weights, perhaps by hand.

    Raises InputError where the outputs would be another model's, and warns of what transformers
    would have set otherwise.
    """
    check_weights(model, source)
    for names in _tied_names(model):
        own = [name for name in names if source.own_name(name) is not None]
        for other in own[1:]:
            if not _hold_the_same(source, own[0], other, model.get_parameter(other).dtype):
                raise InputError(
                    f"the model ties {own[0]!r} and {other!r}, and checkpoint {source.path} has "
                    "different values for them: build the model with tierhints.load(folder), "
                    "which doesn't tie these, or set tie_word_embeddings=False in its config"
                )
    if hasattr(model, "_get_dtype_plan"):
        _check_dtypes(model, source)
        _compare_generation(model, source.path)


def check_weights(model: nn.Module, source: CheckpointSource) -> None:
    """Refuse a quantized checkpoint, and warn of tensors that the model doesn't take."""
    refuse_quantized_config(source.path)
    spare = refuse_codes(model, source)
    if spare:
        warnings.warn(
            f"checkpoint {source.path} has tensors that the model doesn't take, and they are left "
            f"out ({_some(spare)})",
            stacklevel=1,  # one place for load and attach: said once
        )


def refuse_codes(model: nn.Module, source: CheckpointSource) -> dict[str, torch.dtype]:
    """Refuse a checkpoint with codes in place of weights, or with tensors that change what the
    model's own mean, such as scales; return others that the model doesn't take, with their dtypes.
    """
    tensors = dict(_state(model))
    codes = {
        source.resolve(name): source.dtype(name)
        for name, tensor in tensors.items()
        if tensor.dtype in PLAIN_DTYPES
        and name in source
        and source.dtype(name) not in PLAIN_DTYPES
    }
    if codes:
        raise _quantized(source.path, "it has codes in place of floating-point weights", codes)
    buffers = [name for name, _ in model.named_buffers()]
    taken = source.taken([*tensors, *buffers])
    ignored = _ignored_names(model, buffers)
    spare = {
        name: dtype
        for name, dtype in source.in_files().items()
        if name not in taken and not (ignored and ignored.search(name))
    }
    suspects = {name: dtype for name, dtype in spare.items() if not _MASK.search(name)}
    codes = {name: dtype for name, dtype in suspects.items() if dtype in _CODES}
    if codes:
        raise _quantized(source.path, "it has codes that no parameter takes", codes)
    modules = {name.rpartition(".")[0] for name in taken} - {""}
    scales = {name: dtype for name, dtype in suspects.items() if _belongs(name, taken, modules)}
    if scales:
        raise _quantized(
            source.path, "tensors beside weights of the model, which no parameter takes", scales
        )
    return spare


def refuse_quantized_config(path: str | Path) -> None:
    """Refuse a checkpoint whose config.json says that it is quantized; InputError with the kind."""
    kind, folder = quantization_kind(path), _folder(path)
    if kind is not None:
        raise InputError(
            f"checkpoint {folder} is quantized (quantization_config in its config.json: {kind}), "
            f"and its scales would be ignored: {_DEQUANTIZE}"
        )


def quantization_kind(path: str | Path) -> str | None:
    """Return how a checkpoint is quantized by its config.json, None where that says nothing."""
    try:
        document = parse_json((_folder(path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, InputError):
        return None  # who builds a model from it says what is wrong with it
    config = next(_quantization_configs(document), None)
    return None if config is None else str(config.get("quant_method") or config.get("format"))


def separate_ties(model: nn.Module, source: CheckpointSource) -> None:
    """Untie weights for which the checkpoint has different values, as transformers does, and warn;
    those with equal values, and those that it has once, stay tied.
    """
    tied: Any = getattr(model, "all_tied_weights_keys", {})
    pairs = list(tied.items())
    holders = {name: name for pair in pairs for name in pair if source.own_name(name) is not None}
    for index, (target, other) in enumerate(pairs):
        if target in holders and other in holders:
            parameter = model.get_parameter(target)
            if not _hold_the_same(source, holders[target], holders[other], parameter.dtype):
                _give_own_parameter(model, target)
                del tied[target]
                warnings.warn(
                    f"the config ties {target!r} to {other!r}, and checkpoint {source.path} has "
                    "different values for them: they are not tied, as in transformers",
                    stacklevel=2,
                )
                continue
        elif target in holders:
            holders[other] = holders[target]
        elif other not in holders:
            rest = (name for name, with_it in pairs[index + 1 :] if with_it == other)
            found = next((name for name in rest if name in holders), None)
            if found is not None:
                holders[target] = holders[found]
            continue
        holders[target] = holders[other]


def kept_in_fp32(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a transformers model that it loads as fp32 though the rest has
    ``dtype``.
    """
    plan: Mapping[str, torch.dtype] = model._get_dtype_plan(dtype)  # type: ignore[operator]
    if plan:
        pattern = re.compile("|".join(f"({key.replace('*', '.*')})" for key in plan))
        for name, tensor in _state(model):
            if tensor.is_floating_point() and pattern.search(name):
                yield name, tensor


def _check_dtypes(model: nn.Module, source: CheckpointSource) -> None:
    config: Any = model.config
    first = next(model.parameters()).dtype
    dtype = getattr(config, "dtype", None)
    kept = kept_in_fp32(model, dtype if isinstance(dtype, torch.dtype) else first)
    for name, tensor in kept:
        if tensor.dtype != torch.float32:
            raise InputError(
                f"parameter {name!r} is {tensor.dtype} in the model, and transformers keeps it in "
                "float32, without which outputs overflow: build the model with "
                "tierhints.load(folder)"
            )
    if dtype is None and source.first_dtype() != first:
        warnings.warn(
            f"the config names no dtype, so the model was built in {first}, and checkpoint "
            f"{source.path} has {source.first_dtype()}: its weights are converted; build the model "
            "with tierhints.load(folder) for transformers' choice",
            stacklevel=3,
        )


def _compare_generation(model: nn.Module, path: Path) -> None:
    """Warn where a model generates by defaults, and the folder has settings for that."""
    folder = _folder(path)
    settings: Any = getattr(model, "generation_config", None)
    if settings is None or not (folder / "generation_config.json").is_file():
        return
    from transformers import GenerationConfig

    config: Any = model.config
    own = settings.to_dict()
    if own != GenerationConfig.from_model_config(config).to_dict():
        return  # the caller or the checkpoint has chosen
    saved = GenerationConfig.from_pretrained(folder).to_diff_dict()
    unknown = {"transformers_version", "_from_model_config"}
    others = [key for key in saved if key not in unknown and saved[key] != own.get(key)]
    if others:
        warnings.warn(
            f"generation_config.json in {folder} sets {', '.join(sorted(others))}, and the model "
            "doesn't: generate() will go by other settings than transformers'; build the model "
            "with tierhints.load(folder)",
            stacklevel=3,
        )


def _state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield what a checkpoint has of a model: parameters under all names, persistent buffers."""
    yield from model.named_parameters(remove_duplicate=False)
    for path, module in model.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                yield (f"{path}.{key}" if path else key), buffer


def _tied_names(model: nn.Module) -> Iterator[list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    yield from (group for group in names.values() if len(group) > 1)


def _hold_the_same(source: CheckpointSource, first: str, second: str, dtype: torch.dtype) -> bool:
    """Compare two tensors of a checkpoint a piece at a time, as the values that a model gets."""
    if source.own_name(first) == source.own_name(second):
        return True
    shape = source.shape(first)
    if shape != source.shape(second):
        return False
    if not shape:
        return torch.equal(source.read(first).to(dtype), source.read(second).to(dtype))
    row_bytes = max(shape[1:].numel() * source.dtype(first).itemsize, 1)
    step = max(_PIECE_BYTES // row_bytes, 1)
    return all(
        torch.equal(
            source.read(first, start, min(start + step, shape[0])).to(dtype),
            source.read(second, start, min(start + step, shape[0])).to(dtype),
        )
        for start in range(0, shape[0], step)
    )


def _give_own_parameter(model: nn.Module, name: str) -> None:
    path, _, key = name.rpartition(".")
    tied = model.get_parameter(name)
    own = nn.Parameter(torch.empty_like(tied), requires_grad=tied.requires_grad)
    setattr(model.get_submodule(path), key, own)


def _folder(path: str | Path) -> Path:
    """Return the folder that a checkpoint is in."""
    return Path(path) if Path(path).is_dir() else Path(path).parent


def _quantization_configs(document: Any) -> Iterator[Mapping[str, Any]]:
    """Yield what a config and its parts (text_config, ...) say of quantization."""
    if isinstance(document, dict):
        for key, value in document.items():
            if key in _QUANTIZATION_KEYS and isinstance(value, dict) and value:
                yield value
            else:
                yield from _quantization_configs(value)


def _ignored_names(model: nn.Module, buffers: Iterable[str]) -> re.Pattern[str] | None:
    """Return what transformers drops from checkpoints without a word."""
    patterns = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    buffers = list(buffers)  # older checkpoints have them where they were once
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.append(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.append(r"(^|\.)position_ids$")
    return re.compile("|".join(f"({each})" for each in patterns)) if patterns else None


def _belongs(name: str, taken: set[str], modules: set[str]) -> bool:
    """Say whether a tensor that no parameter takes belongs to one that a parameter takes: beside it
    in its module (a bias apart, which changes no weight), or under its name with an ending.
    """
    module, _, key = name.rpartition(".")
    if module in modules and key != "bias":
        return True
    return any(name[: match.start()] in taken for match in re.finditer(r"[._:]", name))


def _quantized(path: Path, how: str, tensors: Mapping[str, torch.dtype]) -> InputError:
    return InputError(f"checkpoint {path} is quantized: {how} ({_some(tensors)}): {_DEQUANTIZE}")


def _some(tensors: Mapping[str, torch.dtype]) -> str:
    names = [f"{name} {str(dtype).removeprefix('torch.')}" for name, dtype in tensors.items()]
    return f"{len(names)}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
