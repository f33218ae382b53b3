"""Optimizer moments in the files of a checkpoint."""

from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import InputError

OPTIMIZER_FILE = "optimizer.safetensors"


def read_moments(folder: Path, *, beta2: float) -> Iterator[tuple[str, Tensor]]:
    """Yield name and bias-corrected second moment of each parameter of a checkpoint, one at a time.

    Raises InputError for a checkpoint without an optimizer, and a damaged one.
    """
    path = folder / OPTIMIZER_FILE
    if not path.is_file():
        raise InputError(f"checkpoint {folder} has no {OPTIMIZER_FILE}: it holds no moments")
    try:
        with safe_open(path, framework="pt") as file:
            names = [key.removesuffix("/step") for key in file.keys() if key.endswith("/step")]
            for name in names:
                steps = file.get_tensor(f"{name}/step").item()
                yield name, file.get_tensor(f"{name}/exp_avg_sq").float() / (1 - beta2**steps)
    except (OSError, SafetensorError, ZeroDivisionError) as error:
        raise InputError(_damaged(path, error)) from error


def _damaged(path: Path, error: BaseException) -> str:
    return (
        f"checkpoint file {path} is damaged ({type(error).__name__}: {error}): delete the folder "
        f"{path.parent} to train again from the start"
    )
