"""Hints from a training checkpoint that exists: Adam's second moment out of its optimizer state.

No training, no process group, no model in memory: the model is built without weights, the moments
are read and summed one parameter at a time. What the files don't say (tokens per update, clipping)
is recorded as unknown: ranks are right, the scale is not, until ``calibrate`` fits it.
"""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn

from ..blocks import unique_parameters, unwrap_model
from ..checkpoint.load import load
from ..checkpoint.optimizer import OptimizerFile, SavedMoment, open_optimizer
from ..checkpoint.optimizer.pickles import reading
from ..checkpoint.source import CheckpointSource, open_checkpoint
from ..errors import InputError
from ..hints import Hints
from ..units import parse_thresholds
from .moment_signal import AdamSignal, MomentSums, check_scale, moment_hints, warn_of_state
from .scale import MomentScale

_FROZEN = "frozen"
_NO_MOMENT = "without a moment in the checkpoint: frozen, or without a gradient"
_CONFIG = "config.json"


def hints_from_checkpoint(
    path: str | Path,
    model: str | Path | nn.Module | None = None,
    *,
    model_id: str | None = None,
    revision: str | None = None,
    hbm_threshold: float = 0.3,
    cpu_threshold: float = 0.8,
    beta2: float | None = None,
    tokens_per_update: float | None = None,
    mean_clip_sq: float | None = None,
    allow_missing: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> Hints:
    """Make hints from the optimizer state that a checkpoint holds (docs/from_checkpoint.md).

    ``path``: the checkpoint's folder, or its optimizer file. ``model``: folder with config.json and
    safetensors weights of the model that was trained, or the model itself; by default the
    checkpoint's own folder. ``model_id`` and ``revision``: what the hints call it (default: the
    folder, and the step). Thresholds: cumulative fractions of weight bytes, as in ``collect``.
    ``beta2``: for files that don't say it. ``tokens_per_update`` and ``mean_clip_sq``: as in
    ``adam_hints``, for the scale; checkpoints of this project have them. ``allow_missing``: take a
    state without the moment of some parameters, which then get no importance; those that are frozen
    in a model that is given (``requires_grad`` False) need no permission. ``progress`` is called
    with the number of parameters done, and of all.

    No code that a file names is run. Warns where the scale is unknown, and of missing moments;
    ``provenance["missing_moments"]`` counts those. Raises InputError for a file that is damaged,
    unsafe or of a format that isn't read, for an optimizer without an elementwise second moment,
    for missing moments, and for names or shapes that aren't the model's.
    """
    hbm_threshold, cpu_threshold = parse_thresholds(hbm_threshold, cpu_threshold)
    check_scale(tokens_per_update, mean_clip_sq, None)
    if mean_clip_sq is not None and tokens_per_update is None:
        raise InputError(
            f"mean_clip_sq {mean_clip_sq} says nothing without the tokens that an update averaged: "
            "give tokens_per_update too (--tokens-per-update), or leave it out (--mean-clip-sq)"
        )
    state = open_optimizer(path, beta2=beta2)
    source: CheckpointSource | None = None
    if isinstance(model, nn.Module):
        network = unwrap_model(model)
        name = type(network).__name__
        if any(each.is_meta for each in network.parameters()):
            raise InputError("the model has no weights in memory: give its folder instead")
    else:
        folder = Path(model) if model is not None else _model_folder(Path(path))
        network, source = _build(folder)
        name = str(folder)
    moments = state.moments(network)
    parameters = unique_parameters(network)
    missing = [
        name for name, each in parameters.items() if name not in moments and each.requires_grad
    ]
    gap = (
        f"{state.path} has no moment of {len(missing)} of {len(parameters)} parameters "
        f"({', '.join(missing[:1])}{', ...' if len(missing) > 1 else ''})"
    )
    if not moments or (missing and not allow_missing):
        raise InputError(
            f"{gap}: copy the whole checkpoint again; if they were frozen, or had no gradient, "
            "allow it (allow_missing=True, --allow-missing)"
        )
    signal = _read_signal(moments, network, progress, state=state)
    warn_of_state(signal)
    if missing:
        warnings.warn(f"{gap}: their blocks are ranked by the rest, or not at all", stacklevel=2)
    if state.scale is not None and tokens_per_update is None:
        with reading(f"the scale of {state.path}"):
            known = MomentScale.from_state_dict(state.scale).values(signal.step)
        tokens_per_update, mean_clip_sq = known or (None, None)
    if tokens_per_update is None or mean_clip_sq is None:
        unknown = (
            "how many tokens an update averaged, nor how gradients were clipped"
            if tokens_per_update is None
            else "how gradients were clipped (--mean-clip-sq, 1 if they were not)"
        )
        order = "" if missing else "the blocks' order is right, "
        warnings.warn(
            f"{state.path} doesn't say {unknown}: {order}the size of the signal is unknown "
            "(tierhints calibrate fits it)",
            stacklevel=2,
        )
    return moment_hints(
        signal,
        network,
        model_id=model_id or name,
        revision=f"step-{signal.step}" if revision is None else revision,
        hbm_threshold=hbm_threshold,
        cpu_threshold=cpu_threshold,
        tokens_per_update=tokens_per_update,
        mean_clip_sq=mean_clip_sq,
        parameter_digest=None if source is None else source.digest(unique_parameters(network)),
        extra_provenance={
            "format": state.format,
            "source": str(state.path),
            "missing_moments": len(missing),
        },
    )


def _read_signal(
    moments: Mapping[str, SavedMoment],
    model: nn.Module,
    progress: Callable[[int, int], object] | None,
    *,
    state: OptimizerFile,
) -> AdamSignal:
    """Sum the moments of a state, one parameter in memory at a time."""
    sums = MomentSums(model)
    parameters = unique_parameters(model)
    for done, (name, parameter) in enumerate(parameters.items(), start=1):
        moment = moments.get(name)
        if moment is None:
            sums.skip(name, _NO_MOMENT if parameter.requires_grad else _FROZEN)
        else:
            values = moment.read()
            if bool((values < 0).any()):
                raise InputError(
                    f"{state.path}: exp_avg_sq of {name!r} has negative numbers, which no mean "
                    "square has: the file is damaged; copy it again"
                )
            sums.add(name, values, steps=moment.steps, beta2=moment.beta2)
        if progress is not None:
            progress(done, len(parameters))
    return sums.signal(
        optimizer=state.kind.name,
        foreign=False,
        implementation="unknown",
        amsgrad=state.kind.amsgrad,
        coupled_weight_decay=state.kind.coupled_weight_decay,
    )


def _model_folder(path: Path) -> Path:
    """Return the folder with the model that a checkpoint belongs to."""
    folder = path if path.is_dir() else path.parent
    found = next((each for each in (folder, folder.parent) if (each / _CONFIG).is_file()), None)
    if found is None:
        raise InputError(
            f"checkpoint {path} has no {_CONFIG}: give the folder of the model that was trained, "
            "with its weights as safetensors (--model)"
        )
    return found


def _build(folder: Path) -> tuple[nn.Module, CheckpointSource]:
    """Build a folder's model without weights, and open those: the digest tells whose hints these
    are.
    """
    if not (folder / _CONFIG).is_file():
        raise InputError(f"model folder {str(folder)!r} has no {_CONFIG}: give a model's folder")
    if not any(folder.glob("*.safetensors*")):
        raise InputError(
            f"model folder {str(folder)!r} has no safetensors weights, by which hints are told "
            "from those of other models: save the model there (save_pretrained), or give another "
            "folder (--model)"
        )
    network = load(folder)
    return network, open_checkpoint(network, folder)
