"""A torch optimizer's ``state_dict`` in one file: the Trainer's ``optimizer.pt``, accelerate's
``optimizer.bin``, or a training loop's own file with an entry ``optimizer``.

    {"state": {key: {"step", "exp_avg", "exp_avg_sq"}}, "param_groups": [{"params": [key], ...}]}

Keys are names under FSDP (accelerate's FULL_STATE_DICT), else numbers; what these stand for is in
the groups' ``param_names``, or is found by ``parameter_order``. Tensors are mapped from the file,
so that one at a time is read.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from ...errors import InputError
from .interface import OptimizerFile, SavedMoment, register_format
from .names import check_shapes, match_names
from .parameter_order import name_parameters
from .pickles import load_torch
from .states import check_keys, check_moment, describe_kind, read_beta2, read_step, shown

_FILES = ("optimizer.pt", "optimizer.bin")
_SUFFIXES = {".pt", ".bin", ".pth", ".ckpt"}
_ENTRIES = ("optimizer", "optimizer_state_dict", "optimizer_states", "optim")


@register_format
class TorchOptimizerFile(OptimizerFile):
    """One file with the whole state."""

    format = "torch state_dict"

    @classmethod
    def find(cls, path: Path) -> Path | None:
        """Return the file."""
        if path.is_file():
            known = path.suffix in _SUFFIXES and not path.name.endswith("_states.pt")
            return path if known else None
        return next((path / name for name in _FILES if (path / name).is_file()), None)

    def __init__(self, path: Path, *, beta2: float | None = None) -> None:
        self.path = path
        document = load_torch(path, where=path)
        self._state, self._groups = _parts(document, path)
        self._group_of = {key: group for group in self._groups for key in group["params"]}
        if len(self._group_of) != sum(len(group["params"]) for group in self._groups):
            raise InputError(f"{path} is damaged: a parameter is in its groups twice")
        self._beta2 = beta2
        for key, state in self._state.items():
            if key not in self._group_of:
                raise InputError(f"{path}: {shown(key)!r} has a state and is in no parameter group")
            if state:
                check_keys(state, str(key), path)
        keys = [key for state in self._state.values() for key in state]
        self.kind = describe_kind(self._groups, keys)

    def find_moments(self, model: nn.Module) -> dict[str, SavedMoment]:
        """Name the moments: by the file's names, or by the model's order."""
        found = {key: self._moment(key, state) for key, state in self._state.items() if state}
        if not found:
            raise InputError(f"{self.path} has no moments yet: save it after the first step")
        names = self._names()
        if names is not None:
            named = {names[key]: moment for key, moment in found.items()}
            return match_names(model, named, path=self.path)
        numbers = cast(list[list[int]], [group["params"] for group in self._groups])
        shapes = {cast(int, key): moment.shape for key, moment in found.items()}
        order = name_parameters(model, numbers, shapes, path=self.path)
        moments = {order[cast(int, key)]: moment for key, moment in found.items()}
        return check_shapes(model, moments, path=self.path)

    def _names(self) -> dict[Any, str] | None:
        """Return key -> name where the file has names."""
        if all(isinstance(key, str) for key in self._group_of):
            return {key: str(key) for key in self._group_of}
        if not any("param_names" in group for group in self._groups):
            return None
        names: dict[Any, str] = {}
        for group in self._groups:
            given = group.get("param_names", ())
            if not isinstance(given, list | tuple) or len(given) != len(group["params"]):
                raise InputError(
                    f"{self.path}: a group of {len(group['params'])} parameters has "
                    f"{len(given) if isinstance(given, list | tuple) else shown(given)} names "
                    "(param_names): save the optimizer again, with all its parameters named"
                )
            names.update(zip(group["params"], map(shown, given), strict=True))
        if len(set(names.values())) != len(names):
            twice = next(name for name, count in Counter(names.values()).items() if count > 1)
            raise InputError(f"{self.path} has {twice!r} twice in param_names: save it again")
        return names

    def _moment(self, key: Any, state: Mapping[str, Any]) -> SavedMoment:
        moment, group = check_moment(state["exp_avg_sq"], str(key), self.path), self._group_of[key]
        return SavedMoment(
            shape=moment.shape,
            steps=(read_step(state, group, str(key), self.path),),
            beta2=read_beta2(group, self._beta2, self.path),
            read=lambda: moment,
        )


def _parts(
    document: Any, path: Path
) -> tuple[dict[int | str, Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Return state and groups of a state_dict, or of the entry of a document that holds one."""
    inner = document
    if isinstance(document, Mapping) and "param_groups" not in document:
        inner = next((document[name] for name in _ENTRIES if name in document), document)
        if isinstance(inner, list) and len(inner) == 1:
            inner = inner[0]
    try:
        state, groups = dict(inner)["state"], dict(inner)["param_groups"]
        sound = (
            isinstance(state, Mapping)
            and all(isinstance(each, Mapping) for each in (*state.values(), *groups))
            and all(isinstance(key, int | str) for group in groups for key in group["params"])
            and len({type(key) for key in (*state, *(k for g in groups for k in g["params"]))}) == 1
        )
    except (TypeError, ValueError, KeyError, IndexError, AttributeError):
        sound = False
    if not sound:
        held = ", ".join(map(shown, list(document)[:4])) if isinstance(document, Mapping) else ""
        what = "a tensor" if isinstance(document, Tensor) else held or type(document).__name__
        raise InputError(
            f"{path} is no torch optimizer's state_dict (it holds {what}, and no state with "
            "param_groups): give the file that optimizer.state_dict() was saved in"
        )
    return dict(state), list(groups)
