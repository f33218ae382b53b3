"""What ``plan`` is given, checked: a model or a folder, its hints, a device."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...blocks import Block, parameter_digest, tied_modules, unique_parameters, unwrap_model
from ...checkpoint.fit import check_fit
from ...checkpoint.load import build_empty_model, load
from ...checkpoint.source import CheckpointSource, open_checkpoint
from ...errors import InputError
from ...hints import Hints, Identify, hints_from_json, load_hints, match_hints
from ..hooks.managed import refuse_managed

HintsGiven = Hints | Mapping[str, Any] | str | Path | None
"""Hints, a parsed document of either form, or a file."""


def open_model(
    model: nn.Module | str | Path, weights: str | Path | None
) -> tuple[nn.Module, CheckpointSource | None]:
    """Return the model to plan for, and its checkpoint where ``weights`` names one. Of a folder the
    model is built without memory for its weights, by the headers of its checkpoint if it has one.
    """
    if not isinstance(model, nn.Module):
        if weights is not None:
            raise InputError(
                "weights has no effect beside a folder, which has the weights: leave it out"
            )
        saved = any(Path(model).glob("*.safetensors*"))
        return (load(model) if saved else build_empty_model(model)), None
    refuse_managed(model)
    model = unwrap_model(model)
    if weights is None:
        return model, None
    checkpoint = open_checkpoint(model, weights)
    check_fit(model, checkpoint)
    return model, checkpoint


def is_in_memory(model: nn.Module) -> bool:
    """Say whether a model has weights: one that is built without them has none in memory."""
    return all(parameter.device.type != "meta" for parameter in model.parameters())


def read_hints(hints: HintsGiven, model: nn.Module, blocks: Sequence[Block]) -> Hints | None:
    """Load hints and match them with the model; the result has exactly the model's blocks. Whether
    they are of these very weights is checked where those are in memory.
    """
    if hints is None:
        return None
    if isinstance(hints, str | Path):
        hints = load_hints(hints)
    elif not isinstance(hints, Hints):
        hints = hints_from_json(hints)
    return _match(hints, blocks, partial(parameter_digest, model) if is_in_memory(model) else None)


def check_digest(
    hints: Hints, model: nn.Module, blocks: Sequence[Block], checkpoint: CheckpointSource
) -> None:
    """Refuse hints that were made for other weights than a checkpoint's, of which it reads what
    identifies them.
    """
    _match(hints, blocks, partial(checkpoint.digest, unique_parameters(model)))


def choose_device(model: nn.Module, device: str | torch.device | None) -> torch.device:
    """Return the device that computes: the one given, which need not be here, or that of the
    weights. Raises InputError for one that can't compute.
    """
    if device is None:
        first = next(model.parameters()).device
        return torch.device("cpu") if first.type == "meta" else first
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise InputError(
            f"device {device!r} can't be used: {str(error).splitlines()[0]}"
        ) from error
    if chosen.type not in ("cpu", "cuda"):
        raise InputError(f"device {str(device)!r} is no place to compute here: give cpu or cuda")
    return chosen


def _match(hints: Hints, blocks: Sequence[Block], identify: Identify | None) -> Hints:
    matched = match_hints(
        hints,
        [block.name for block in blocks],
        identify=identify,
        tied=tied_modules(blocks),
    )
    return replace(hints, blocks=matched)
