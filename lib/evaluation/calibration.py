"""calibrate(): hints with what each precision costs each block, from a model and text.

What it puts together is in ``calibrate``, ``predictions`` and ``kernel_error``.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import parameter_digest, partition_model
from ..checkpoint.models import cast_weights
from ..errors import InputError
from ..hints import Hints, load_hints, match_hints
from ..precision.perturb import curve_precisions
from ..precision.remember import Remember, call
from ..precision.tolerance import PROBES
from ..progress import progress_bar
from ..signals.summary import check_token_ids, dtype_names
from ..text.held_out import HeldOutText
from ..text.parts import PARTS, TextParts, cut_parts, vocabulary_size
from .calibrate import DRAWS, PLANS, CalibratedModel, calibrate_model, calibrated_hints
from .journal import Journal
from .kernel_error import measure_kernels


def calibrate(
    model: nn.Module,
    hints: Hints | str | Path,
    tokens: Tensor,
    *,
    draws: int = DRAWS,
    seed: int = 0,
    source: str = "",
    journal: str | Path | None = None,
) -> Hints:
    """Predict what storing each block at fewer bits costs, check that against measurement, and
    return the hints with both: what ``attach(..., epsilon=)`` goes by.

    ``tokens``: integer ids (N, T) without padding, such as those of ``read_tokens``; more sequences
    give narrower bounds. They are cut in three, taking turns: Fisher information is estimated on
    the first part, KL measured on the second, and the third is left to judge on
    (``cut_parts``). ``draws``: gradients with sampled labels; the standard error of a prediction is
    sqrt(2 / draws). ``seed``: of labels and probes. ``source``, where the text is from, is written
    into the hints. ``journal``: a file that keeps each step while this runs, so that the same call
    goes on where it was interrupted; it is removed at the end.

    The model is in evaluation mode, and left as it was; it takes the memory of a copy in float32.
    Raises InputError for hints that aren't this model's or flat, and for fewer than 6 sequences;
    FloatingPointError where logits or gradients aren't finite.
    """
    if not isinstance(hints, Hints):
        hints = load_hints(hints)
    check_hints(hints, model)
    check_token_ids(tokens, model)
    if len(tokens) < 2 * PARTS:
        raise InputError(
            f"{len(tokens)} sequences are too few: gradients, calibration and judging need two "
            f"each, so give {2 * PARTS} or more"
        )
    text = cut_parts(HeldOutText(tokens=tokens.cpu(), source=source), seed=None)
    folder = getattr(getattr(model, "config", None), "name_or_path", "") or "the model"
    with _dtypes_kept(model):
        calibrated, _ = calibrate_on_parts(
            model, hints, text, folder=folder, draws=draws, seed=seed, journal=journal
        )
    return calibrated


def calibrate_on_parts(
    model: Any,
    hints: Hints,
    text: TextParts,
    *,
    folder: str,
    draws: int = DRAWS,
    seed: int = 0,
    oracle: bool = False,
    every_sequence: bool = False,
    journal: str | Path | None = None,
) -> tuple[Hints, CalibratedModel]:
    """Calibrate hints that fit the model (``check_hints``) on a text that is cut already; returns
    also what was predicted and measured.

    As ``calibrate``, but the model stays in float32. ``folder``: where the optimizer's moments are.
    ``oracle`` and ``every_sequence`` as ``calibrate_model`` takes them.
    """
    assert hints.model is not None
    subject = {
        "model": hints.model.parameter_digest,
        "provenance": dict(hints.provenance),
        "dtypes": dtype_names(model),
        "device": str(next(model.parameters()).device),
        "folder": folder,
        "text": text.to_json(),
        "draws": draws,
        "seed": seed,
        "oracle": oracle,
        "constants": [PROBES, PLANS],
    }
    with ExitStack() as stack:
        remember: Remember = call
        if journal is not None:
            remember = stack.enter_context(Journal(Path(journal), subject))
        with progress_bar(len(curve_precisions(model)), "kernels") as bar:
            kernels = measure_kernels(
                model,
                text.calibration,
                device=next(model.parameters()).device,
                remember=remember,
                progress=bar.update,
            )
        cast_weights(model, torch.float32)
        found = calibrate_model(
            model,
            text.fisher,
            text.calibration,
            folder=folder,
            hints=hints,
            vocab_size=vocabulary_size(model),
            draws=draws,
            seed=seed,
            oracle=oracle,
            every_sequence=every_sequence,
            remember=remember,
        )
        return calibrated_hints(hints, found, kernels=kernels, text=text.to_json()), found


def check_hints(hints: Hints, model: Any) -> None:
    """Raise InputError for hints that aren't this model's, or have no place for a curve."""
    names = [block.name for block in partition_model(model)]
    if hints.model is None:
        raise InputError("flat hints have no place for a KL curve: make full ones for this model")
    match_hints(hints, names, identify=partial(parameter_digest, model))
    if unknown := sorted(set(names) - set(hints.blocks)):
        raise InputError(f"block {unknown[0]!r} has no hint of its own: make the hints anew")


@contextmanager
def _dtypes_kept(model: nn.Module) -> Iterator[None]:
    """Cast weights back to what they were: 16-bit numbers are float32 numbers."""
    dtypes = [(parameter, parameter.dtype) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, dtype in dtypes:
            parameter.data = parameter.data.to(dtype)
