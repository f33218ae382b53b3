"""This project's own checkpoints: ``optimizer.safetensors`` beside ``trainer_state.json``.

Tensors are named ``<parameter>/exp_avg_sq`` and ``<parameter>/step``, as ``gpt2.checkpoint`` writes
them. The scale in ``trainer_state.json`` says beta2, and how many tokens an update averaged.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...errors import InputError
from ...files import parse_json
from .interface import OptimizerFile, OptimizerKind, SavedMoment, register_format
from .names import match_names
from .pickles import damaged
from .states import check_keys, check_moment, read_beta2, read_step

OPTIMIZER_FILE = "optimizer.safetensors"
_STATE_FILE = "trainer_state.json"


@register_format
class OwnOptimizerFile(OptimizerFile):
    """A safetensors file with the tensors of each parameter's state."""

    format = "tierhints checkpoint"

    @classmethod
    def find(cls, path: Path) -> Path | None:
        """Return the file."""
        if path.is_file():
            return path if path.name == OPTIMIZER_FILE else None
        return path / OPTIMIZER_FILE if (path / OPTIMIZER_FILE).is_file() else None

    def __init__(self, path: Path, *, beta2: float | None = None) -> None:
        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
            names = list(self._file.keys())  # type: ignore[no-untyped-call]
        except (OSError, SafetensorError) as error:
            raise damaged(path, error) from error
        self._states: dict[str, set[str]] = {}
        for name in names:
            parameter, _, key = name.rpartition("/")
            self._states.setdefault(parameter, set()).add(key)
        for parameter, keys in self._states.items():
            check_keys(keys, parameter, path)
        self.scale = _read_scale(path.with_name(_STATE_FILE))
        group = {} if self.scale is None else {"betas": (None, self.scale.get("beta2"))}
        self._beta2 = read_beta2(group, beta2, path)
        self.kind = OptimizerKind(name="AdamW", amsgrad=False, coupled_weight_decay=False)

    def find_moments(self, model: nn.Module) -> dict[str, SavedMoment]:
        """Match the names of the file with the model's."""
        return match_names(model, self.named_moments(), path=self.path)

    def named_moments(self) -> dict[str, SavedMoment]:
        """Return the moments by the file's own names."""
        return {name: self._moment(name) for name in self._states}

    def _moment(self, name: str) -> SavedMoment:
        state = {"step": self._tensor(f"{name}/step")} if "step" in self._states[name] else {}
        try:
            part: Any = self._file.get_slice(f"{name}/exp_avg_sq")  # type: ignore[no-untyped-call]
            shape = torch.Size(part.get_shape())
        except SafetensorError as error:
            raise damaged(self.path, error) from error
        return SavedMoment(
            shape=shape,
            steps=(read_step(state, {}, name, self.path),),
            beta2=self._beta2,
            read=lambda: check_moment(self._tensor(f"{name}/exp_avg_sq"), name, self.path),
        )

    def _tensor(self, name: str) -> Tensor:
        try:
            found: Tensor = self._file.get_tensor(name)  # type: ignore[no-untyped-call]
        except (OSError, SafetensorError) as error:
            raise damaged(self.path, error) from error
        return found


def _read_scale(path: Path) -> Mapping[str, Any] | None:
    """Return what ``signals.MomentScale`` stored; None without the file, or of another trainer."""
    if not path.is_file():
        return None
    try:
        document = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, InputError) as error:
        raise damaged(path, error) from error
    scale = document.get("scale") if isinstance(document, dict) else None
    return scale if isinstance(scale, dict) and "beta2" in scale else None
