"""calibrate(): hints with what each precision costs each block, from a model and text.

What it puts together is in ``calibrate``, ``predictions`` and ``kernel_error``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
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
from ..progress import progress_bar
from ..signals.summary import check_token_ids
from ..text.held_out import HeldOutText
from ..text.parts import PARTS, cut_parts, vocabulary_size
from .calibrate import DRAWS, calibrate_model, calibrated_hints
from .kernel_error import measure_kernels


def calibrate(
    model: nn.Module,
    hints: Hints | str | Path,
    tokens: Tensor,
    *,
    draws: int = DRAWS,
    seed: int = 0,
    source: str = "",
) -> Hints:
    """Predict what storing each block at fewer bits costs, check that against measurement, and
    return the hints with both: what ``attach(..., epsilon=)`` goes by.

    ``tokens``: integer ids (N, T) without padding, such as those of ``read_tokens``; more sequences
    give narrower bounds. They are cut in three, taking turns: Fisher information is estimated on
    the first part, KL measured on the second, and the third is left to judge on
    (``cut_parts``). ``draws``: gradients with sampled labels; the standard error of a prediction is
    sqrt(2 / draws). ``seed``: of labels and probes. ``source``, where the text is from, is written
    into the hints.

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
    device = next(model.parameters()).device
    with progress_bar(len(curve_precisions(model)), "kernels") as bar:
        kernels = measure_kernels(model, text.calibration, device=device, progress=bar.update)
    with _in_float32(model):
        found = calibrate_model(
            model,
            text.fisher,
            text.calibration,
            folder=getattr(getattr(model, "config", None), "name_or_path", "") or "the model",
            hints=hints,
            vocab_size=vocabulary_size(model),
            draws=draws,
            seed=seed,
        )
    return calibrated_hints(hints, found, kernels=kernels, text=text.to_json())


def check_hints(hints: Hints, model: Any) -> None:
    """Raise InputError for hints that aren't this model's, or have no place for a curve."""
    names = [block.name for block in partition_model(model)]
    if hints.model is None:
        raise InputError("flat hints have no place for a KL curve: make full ones for this model")
    match_hints(hints, names, identify=partial(parameter_digest, model))
    if unknown := sorted(set(names) - set(hints.blocks)):
        raise InputError(f"block {unknown[0]!r} has no hint of its own: make the hints anew")


@contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """Cast the weights, and back: 16-bit numbers are float32 numbers."""
    dtypes = [(parameter, parameter.dtype) for parameter in model.parameters()]
    cast_weights(model, torch.float32)
    try:
        yield
    finally:
        for parameter, dtype in dtypes:
            parameter.data = parameter.data.to(dtype)
