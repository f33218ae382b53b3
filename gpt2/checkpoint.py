"""The checkpoint folder: a Hugging Face model folder plus all that continuing needs.

    config.json, generation_config.json, model.safetensors, tokenizer files: for from_pretrained
    optimizer.safetensors    "<parameter>/exp_avg", "/exp_avg_sq" and "/step", never sharded
    heldout.safetensors      "tokens": the sequences (n, context) that held-out loss is measured on
    pruning.safetensors      boolean masks of a run that prunes, see gpt2/pruning.py
    trainer_state.json       TrainerState

A checkpoint is written beside its place, flushed to the disk, and renamed. Whatever moment a crash
comes at, ``checkpoint`` or ``checkpoint.old`` is whole, and ``recover_checkpoint`` puts it back.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from lib.blocks import unique_parameters, whole_tensor
from lib.checkpoint.optimizer import OPTIMIZER_FILE
from lib.errors import InputError
from lib.signals.summary import class_name

from .distributed import is_main, like_parameter
from .pruning import MASKS_FILE

MODEL_FILE = "model.safetensors"
HELDOUT_FILE = "heldout.safetensors"
STATE_FILE = "trainer_state.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerState:
    """How far a run is. Losses in nats per token; ``scale`` is MomentScale's state, and
    ``router_counts`` how often each expert's block was routed to.
    """

    step: int
    complete: bool
    corpus_digest: str
    train_loss: float
    heldout_loss: float | None
    unigram_entropy: float
    tokens: int
    train_seconds: float
    scale: Mapping[str, float]
    router_counts: Mapping[str, int]


def save_checkpoint(
    folder: Path,
    *,
    network: Any,
    optimizer: Optimizer,
    tokenizer: Any,
    heldout: Tensor,
    heldout_metadata: Mapping[str, str],
    masks: Mapping[str, Tensor],
    state: TrainerState,
) -> None:
    """Write a checkpoint and put it in the place of the one before. Every rank must call it; the
    main one writes.

    Raises OSError, with the reason in plain words, when it can't be written; the checkpoint before
    is then untouched.
    """
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    for name, parameter in unique_parameters(network).items():
        weights[name] = _gather(parameter)
        assert optimizer.state.get(parameter), f"{name} has no optimizer state"
        for key, value in optimizer.state[parameter].items():
            moments[f"{name}/{key}"] = _gather(value)
    if not is_main():
        return
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with _plain_write_errors(folder):
            partial.mkdir(parents=True)
            network.config.architectures = [class_name(network)]
            network.config.save_pretrained(partial)
            network.generation_config.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            save_file(weights, partial / MODEL_FILE, metadata={"format": "pt"})
            save_file(moments, partial / OPTIMIZER_FILE)
            save_file({"tokens": heldout}, partial / HELDOUT_FILE, metadata=dict(heldout_metadata))
            if masks:
                save_file(dict(masks), partial / MASKS_FILE)
            (partial / STATE_FILE).write_text(json.dumps(asdict(state), indent=2) + "\n")
            _flush(partial)
            _replace(folder, partial)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def keep_checkpoint(folder: Path, copy: Path) -> None:
    """Copy a checkpoint to a place of its own; whole or absent there, whatever happens.

    Raises OSError when it can't be written.
    """
    partial = copy.with_name(f".{copy.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(copy, ignore_errors=True)
    try:
        with _plain_write_errors(copy):
            shutil.copytree(folder, partial)
            partial.rename(copy)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def recover_checkpoint(folder: Path) -> None:
    """Finish, or undo, what a crash in the middle of ``save_checkpoint`` left."""
    old = _old(folder)
    if old.exists() and not folder.exists():
        old.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(folder.with_name(f".{folder.name}.partial"), ignore_errors=True)


def load_state(folder: Path) -> TrainerState | None:
    """Read how far the run of a checkpoint was, or None if there is no checkpoint; raises
    InputError if it is damaged.
    """
    path = folder / STATE_FILE
    if not folder.exists():
        return None
    try:
        document = {"router_counts": {}, **json.loads(path.read_text())}  # older ones lack it
        return TrainerState(**{field.name: document[field.name] for field in fields(TrainerState)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(_damaged(path, error)) from error


def load_optimizer(folder: Path, network: Any, optimizer: Optimizer) -> None:
    """Fill a new fused AdamW's state from a checkpoint, sharded as the parameters are; raises
    InputError if it doesn't fit.
    """
    path = folder / OPTIMIZER_FILE
    try:
        with safe_open(path, framework="pt") as file:
            stored = set(file.keys())
            for name, parameter in unique_parameters(network).items():
                moments = {}
                for key in ("exp_avg", "exp_avg_sq"):
                    moment = file.get_tensor(f"{name}/{key}")
                    stored.remove(f"{name}/{key}")
                    if moment.shape != parameter.shape:
                        raise ValueError(
                            f"{name}/{key} has shape {tuple(moment.shape)}, not "
                            f"{tuple(parameter.shape)}"
                        )
                    moments[key] = like_parameter(moment, parameter)
                # Fused AdamW counts on the parameter's device.
                moments["step"] = file.get_tensor(f"{name}/step").to(parameter.device)
                stored.remove(f"{name}/step")
                optimizer.state[parameter] = moments
        if stored:
            raise ValueError(f"it holds {sorted(stored)[0]}, which the model has not")
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise InputError(_damaged(path, error)) from error


def _gather(tensor: Tensor) -> Tensor:
    """Return the whole tensor on the CPU; collective for sharded ones. Other ranks than the main
    one keep nothing.
    """
    whole = whole_tensor(tensor.detach())
    return whole.cpu().contiguous() if is_main() else torch.empty(0)


def _replace(folder: Path, partial: Path) -> None:
    old = _old(folder)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _old(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.old")


def _flush(folder: Path) -> None:
    """Force the files to the disk, so that after a power cut the rename can't be there without
    them; and give them the mode of the others, where safetensors makes them private.
    """
    mode = (folder / STATE_FILE).stat().st_mode
    for path in folder.iterdir():
        path.chmod(mode)
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _plain_write_errors(folder: Path) -> Iterator[None]:
    """Say what a failed write means; safetensors reports a full disk as an error of its own."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        if number == errno.ENOSPC or "os error 28" in str(error):
            raise OSError(
                f"the disk of {folder} is full: free some space and start again; the last good "
                "checkpoint is untouched"
            ) from error
        raise OSError(
            f"checkpoint {folder} can't be written ({error}); the last good checkpoint is untouched"
        ) from error


def _damaged(path: Path, error: BaseException) -> str:
    return (
        f"checkpoint file {path} is damaged ({type(error).__name__}: {error}): delete the folder "
        f"{path.parent} to train again from the start"
    )
