"""Checks of what an optimizer kept: is it an elementwise second moment, and of which window?"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from .interface import OptimizerKind

FIX = "train with AdamW, or measure the checkpoint with tierhints collect"
FACTORED = (
    "keeps only row and column averages of the second moment (factored), not one value per weight"
)
ROTATED = "keeps a preconditioner: its second moment lies in a rotated basis"
QUANTIZED = "keeps its moments quantized in 8 bits or fewer, with an error larger than most of them"

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MAX_STEP = 2**53
_REFUSED: tuple[tuple[str, frozenset[str], str], ...] = (
    ("Adafactor or CAME", frozenset({"exp_avg_sq_row", "exp_avg_sq_col", "row_var", "col_var"}),
     FACTORED),
    ("SOAP or Shampoo", frozenset({"Q", "GG", "preconditioner", "preconditioners", "shampoo",
                                   "factor_matrices", "precond_0", "pre_cond_0"}), ROTATED),
    ("bitsandbytes", frozenset({"state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2"}),
     f"{QUANTIZED}, and keeps 32-bit ones under names of its own"),
    ("Adamax", frozenset({"exp_inf"}), "keeps a decayed maximum of gradients, not their mean "
     "square"),
    ("RMSprop or Adadelta", frozenset({"square_avg", "acc_delta"}),
     "keeps a mean square that is not bias-corrected, under another name"),
)  # fmt: skip
"""Optimizer, keys that only its state has, why that can't stand for a Fisher diagonal."""


def refuse_keys(keys: Iterable[str], who: str | None = None) -> None:
    """Raise InputError for keys of a state that holds no elementwise second moment; ``who`` is the
    optimizer, by default the one that the keys give away.
    """
    keys = set(keys)
    for name, telling, reason in _REFUSED:
        if telling & keys:
            raise InputError(f"optimizer {who or name} {reason}: {FIX}")


def check_keys(keys: Iterable[str], parameter: str, path: object) -> None:
    """Raise InputError unless a parameter's state has Adam's second moment."""
    keys = {shown(key) for key in keys}
    refuse_keys(keys)
    if "exp_avg_sq" in keys:
        return
    kept = ", ".join(sorted(keys)) or "nothing"
    guess = (
        "as SGD and Muon do, "
        if "momentum_buffer" in keys
        else "as Adagrad does, "
        if "sum" in keys
        else "as Lion does, "
        if "exp_avg" in keys
        else ""
    )
    raise InputError(
        f"{path} keeps {kept} of {parameter!r}, {guess}and no second moment exp_avg_sq: {FIX}"
    )


def check_moment(moment: Any, parameter: str, path: object) -> Tensor:
    """Return a plain second moment of 16, 32 or 64 bits; raises InputError for another thing."""
    if (
        type(moment) is Tensor
        and moment.dtype in _DTYPES
        and moment.layout == torch.strided
        and moment.device.type == "cpu"
        and not moment.is_nested
    ):
        return moment
    kind = type(moment).__name__
    if isinstance(moment, Tensor):
        kind += f" of {moment.dtype}, {moment.layout}, on {moment.device}"
    raise InputError(
        f"{path}: exp_avg_sq of {parameter!r} is {kind}, not plain floating point (fp16, bf16, "
        f"fp32 or fp64, with its numbers in the file): {FIX}"
    )


def shown(value: object) -> str:
    """Return a file's value for a message; a container may go on forever, so its type alone."""
    plain = value is None or type(value) in (str, int, float, bool)
    return str(value)[:200] if plain else type(value).__name__


def _number(value: object) -> float:
    """Return a number that was saved as one, or as a tensor of one; TypeError for anything else."""
    if isinstance(value, Tensor) and value.numel() == 1 and value.dtype is not torch.bool:
        return float(value)
    if type(value) not in (int, float):
        raise TypeError(f"{type(value).__name__} is no number")
    return float(value)  # type: ignore[arg-type]


def read_step(state: Mapping[str, Any], group: Mapping[str, Any], name: str, path: object) -> int:
    """Return how many updates a moment has seen; some libraries count per parameter group."""
    step = state.get("step", group.get("step"))
    try:
        count = _number(step)
    except (TypeError, RuntimeError, OverflowError) as error:
        raise InputError(
            f"{path} keeps no step for {name!r}, so its moment can't be bias-corrected: {FIX}"
        ) from error
    if not (1 <= count <= _MAX_STEP and count.is_integer()):
        raise InputError(
            f"{path}: the moment of {name!r} is at step {count:g}, not a whole number from 1 to "
            f"2**53: take a step first, or copy the file again"
        )
    return int(count)


def read_beta2(group: Mapping[str, Any], given: float | None, path: object) -> float:
    """Return the decay of a group's second moment: the file's, or the one that was given."""
    betas = group.get("betas")
    if betas is None and given is not None:
        return given
    if betas is None:
        raise InputError(f"{path} doesn't say beta2: give it (--beta2)")
    try:
        beta2 = _number(betas[1])
    except (TypeError, RuntimeError, OverflowError, IndexError, KeyError) as error:
        raise InputError(
            f"{path} has a {type(betas).__name__} for betas: two numbers are needed, beta2 in "
            f"[0, 1) for the bias correction: {FIX}"
        ) from error
    if not 0 <= beta2 < 1:
        raise InputError(f"{path} has beta2 {beta2}: it must be in [0, 1)")
    if given is not None and given != beta2:
        raise InputError(f"{path} says that beta2 is {beta2}, not {given}: leave it out (--beta2)")
    return beta2


def describe_kind(groups: Iterable[Mapping[str, Any]], keys: Iterable[str]) -> OptimizerKind:
    """Say what parameter groups and a state's keys tell of an optimizer. RAdam looks like Adam."""
    groups = list(groups)
    flags = [group.get("decoupled_weight_decay") for group in groups]
    told = {flag if type(flag) is bool else None for flag in flags}
    decoupled = told.pop() if len(told) == 1 else None
    name = "NAdam" if "mu_product" in set(keys) else "Adam" if decoupled is False else "AdamW"
    coupled: bool | None = None
    if decoupled is not None:
        coupled = not decoupled and any(bool(group.get("weight_decay")) for group in groups)
    return OptimizerKind(
        name=name,
        amsgrad=any(bool(group.get("amsgrad")) for group in groups),
        coupled_weight_decay=coupled,
    )
