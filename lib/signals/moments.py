"""Bias-corrected moments out of a checkpoint, one parameter at a time."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from ..checkpoint.optimizer import OPTIMIZER_FILE, OwnOptimizerFile
from ..errors import InputError


def read_moments(folder: Path, *, beta2: float) -> Iterator[tuple[str, Tensor]]:
    """Yield name and bias-corrected second moment of each parameter of one of this project's
    checkpoints.

    Raises InputError for a checkpoint without an optimizer, and a damaged one.
    """
    path = folder / OPTIMIZER_FILE
    if not path.is_file():
        raise InputError(f"checkpoint {folder} has no {OPTIMIZER_FILE}: it holds no moments")
    for name, moment in OwnOptimizerFile(path, beta2=beta2).named_moments().items():
        yield name, moment.corrected()
