"""What an optimizer state on disk has to give: the second moment of each parameter, one at a time.

Formats are registered by name; ``open_optimizer`` finds the one that a path is of. No model is
needed in memory: parameters are looked up by name and shape in one that was built without weights.
tests/unit/checkpoint/optimizer/test_every_format.py is the suite that each passes.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ...errors import InputError
from ...registry import Registry
from .pickles import reading

_UNREAD: tuple[tuple[str, str], ...] = (
    (r"optim\.safetensors|optim\.pt", "OLMo's first format names its tensors by pickled tuples"),
    (r"rank\d+-of-\d+-optimizer\.pt", "it is split by an XLA mesh that the files don't describe"),
    (r"optimizer_\d+_rank\d+\.bin", "FSDP's local shards don't say what they are parts of; save "
     "with FULL_STATE_DICT or SHARDED_STATE_DICT"),
    (r"optim_\d+_rank\d+\.pt", "nanochat trains matrices with Muon, which keeps no second moment "
     "of them; measure the model with tierhints collect"),
    (r"distrib_optim\.pt|model_optim_rng\.pt", "Megatron keeps its state in buckets that only its "
     "own code can take apart; convert it to torch_dist by parameter, or measure the model with "
     "tierhints collect"),
)  # fmt: skip
"""Name of a file that is known and not read -> why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedMoment:
    """One parameter's second moment in a file, not yet read."""

    shape: torch.Size
    steps: tuple[int, ...]
    """Updates that it has seen: one number, or one per row where rows were saved one by one."""
    beta2: float
    read: Callable[[], Tensor]
    """Returns ``exp_avg_sq`` whole, of ``shape``, not bias-corrected; InputError if damaged."""

    def corrected(self) -> Tensor:
        """Read it and divide by 1 - beta2^step."""
        return self.read() / self.correction

    @property
    def correction(self) -> float | Tensor:
        """What to divide by: a number, or one per row, to be put against the first dimension."""
        if len(self.steps) == 1:
            return float(1 - self.beta2 ** self.steps[0])
        rows = torch.tensor([1 - self.beta2**step for step in self.steps], dtype=torch.float32)
        return rows.reshape(-1, *[1] * (len(self.shape) - 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerKind:
    """What a state says of the optimizer that made it; None where it doesn't."""

    name: str
    amsgrad: bool
    coupled_weight_decay: bool | None


class OptimizerFile(ABC):
    """An optimizer state on disk, opened: nothing but names, shapes and settings is read so far.

    ``path`` is what was found, ``kind`` what it says of the optimizer, ``scale`` what
    ``signals.MomentScale`` stored with it. The constructor raises InputError for a file that is
    damaged, of another kind, or of an optimizer without an elementwise second moment. No code that
    a file names is ever run.
    """

    format: ClassVar[str]
    path: Path
    kind: OptimizerKind
    scale: Mapping[str, Any] | None = None

    @classmethod
    @abstractmethod
    def find(cls, path: Path) -> Path | None:
        """Return the file or folder of this format that ``path`` is or holds, None without one."""

    @abstractmethod
    def __init__(self, path: Path, *, beta2: float | None = None) -> None:
        """Open what ``find`` returned; ``beta2`` is for files that don't say it."""

    @abstractmethod
    def find_moments(self, model: nn.Module) -> dict[str, SavedMoment]:
        """Do the work of ``moments``; what it and ``read`` raise is an InputError there."""

    def moments(self, model: nn.Module) -> dict[str, SavedMoment]:
        """Return canonical parameter name -> moment, of those that the file has. The model may be
        without memory. Raises InputError where names or shapes are not the model's.
        """
        with reading(self.path):
            found = self.find_moments(model)
        return {
            name: replace(moment, read=partial(self._read, moment))
            for name, moment in found.items()
        }

    def _read(self, moment: SavedMoment) -> Tensor:
        with reading(self.path):
            return moment.read()


FORMATS: Registry[type[OptimizerFile]] = Registry("optimizer state format")
FormatClass = TypeVar("FormatClass", bound=type[OptimizerFile])


def register_format(kind: FormatClass) -> FormatClass:
    """Let ``open_optimizer`` know a format: a decorator."""
    FORMATS.add(kind.format, kind)
    return kind


def open_optimizer(path: str | Path, *, beta2: float | None = None) -> OptimizerFile:
    """Open the optimizer state that a file is, or that a checkpoint folder holds.

    ``beta2``: the decay of the second moment, for states that don't record it. Raises InputError
    for a path without one that is read here, and one with several.
    """
    path = Path(path)
    if beta2 is not None and not 0 <= beta2 < 1:
        raise InputError(f"beta2 {beta2} must be in [0, 1)")
    if not path.exists():
        raise InputError(f"checkpoint {path} does not exist: give a folder, or its optimizer file")
    with reading(path):
        places_of = [(kind, kind.find(path)) for kind in FORMATS.values()]
    found = [(kind, place) for kind, place in places_of if place is not None]
    if not found:
        raise InputError(_nothing_found(path))
    if len(found) > 1:
        places = " and ".join(f"{place} ({kind.format})" for kind, place in found)
        raise InputError(f"checkpoint {path} has several optimizer states: give one, {places}")
    kind, place = found[0]
    with reading(place):
        return kind(place, beta2=beta2)


def is_plain_name(name: str) -> bool:
    """Tell whether a name is one of a file or folder in the folder at hand, and of nowhere else."""
    return bool(name) and name == Path(name).name and name != ".."


def _nothing_found(path: Path) -> str:
    names = sorted(each.name for each in path.iterdir()) if path.is_dir() else [path.name]
    for name in names:
        for pattern, reason in _UNREAD:
            if re.fullmatch(pattern, name):
                return f"checkpoint {path}: the optimizer state {name} is not read: {reason}"
    held = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return (
        f"checkpoint {path} holds no optimizer state that is read here (it has {held or 'nothing'};"
        f" read are: {', '.join(FORMATS)}): give the folder that the training run saved, or "
        "measure the model with tierhints collect"
    )
