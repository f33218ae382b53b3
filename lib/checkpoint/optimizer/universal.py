"""DeepSpeed's universal checkpoints: ``zero/<parameter>/exp_avg_sq.pt``, one file per parameter.

Written by deepspeed.checkpoint.ds_to_universal, which has put ranks and slices together. Updates
are counted in ``step.pt`` beside. Of stage 3 the tensors are flat, and the one
``optimizer_state.pt`` counts.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InputError
from .deepspeed import PACKAGES
from .interface import OptimizerFile, SavedMoment, register_format
from .names import match_names
from .pickles import load_torch
from .states import check_moment, describe_kind, read_beta2, read_step

_FOLDER = "zero"
_SETTINGS = "optimizer_state.pt"


@register_format
class UniversalCheckpoint(OptimizerFile):
    """A folder with a folder per parameter."""

    format = "DeepSpeed universal"

    @classmethod
    def find(cls, path: Path) -> Path | None:
        """Return the folder ``zero``: this one, or the one in it."""
        if not path.is_dir():
            return None
        folders = (path, path / _FOLDER)
        return next((each for each in folders if any(each.glob("*/exp_avg_sq.pt"))), None)

    def __init__(self, path: Path, *, beta2: float | None = None) -> None:
        self.path = path
        settings = path / _SETTINGS
        document = (
            load_torch(settings, where=settings, inert=PACKAGES) if settings.is_file() else {}
        )
        groups = document.get("param_groups") if isinstance(document, Mapping) else None
        self._groups: list[Mapping[str, Any]] = list(groups or [{}])
        self._beta2 = {read_beta2(group, beta2, settings) for group in self._groups}
        if len(self._beta2) > 1:
            raise InputError(
                f"{path}: the parameter groups differ in beta2 ({sorted(self._beta2)}), and the "
                "folder doesn't say which parameter is in which"
            )
        self._step = _common_step(document, settings)
        self.kind = describe_kind(self._groups, ())

    def find_moments(self, model: nn.Module) -> dict[str, SavedMoment]:
        """Match the names of the folders with the model's."""
        files = sorted(self.path.glob("*/exp_avg_sq.pt"))
        shapes = {name: each.shape for name, each in model.named_parameters(remove_duplicate=False)}
        found = {
            file.parent.name: self._moment(file, shapes.get(file.parent.name)) for file in files
        }
        return match_names(model, found, path=self.path)

    def _moment(self, file: Path, wanted: torch.Size | None) -> SavedMoment:
        shape = _read(file).shape
        if wanted is not None and shape == (wanted.numel(),):
            shape = wanted
        step = file.with_name("step.pt")
        state = {"step": load_torch(step, where=step) if step.is_file() else self._step}
        return SavedMoment(
            shape=shape,
            steps=(read_step(state, self._groups[0], file.parent.name, self.path),),
            beta2=next(iter(self._beta2)),
            read=lambda: _read(file).view(shape),
        )


def _common_step(document: Any, path: Path) -> int | None:
    """Return the number of updates that all of stage 3's flat vectors have seen, None otherwise."""
    base = document.get("optimizer_state_dict") if isinstance(document, Mapping) else None
    states = base.get("state") if isinstance(base, Mapping) else None
    if not isinstance(states, Mapping) or not all(isinstance(s, Mapping) for s in states.values()):
        return None
    steps = {read_step(state, {}, "all", path) for state in states.values() if "step" in state}
    return steps.pop() if len(steps) == 1 else None


def _read(file: Path) -> Tensor:
    document = load_torch(file, where=file)
    moment = document.get("param") if isinstance(document, Mapping) else document
    return check_moment(moment, file.parent.name, file)
