"""Which optimizers keep an elementwise second moment, and why the others are refused by name.

``adam`` sums the moments per block.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..blocks import unique_parameters, whole_tensor
from ..checkpoint.optimizer.states import FACTORED, FIX, QUANTIZED, refuse_keys
from ..errors import InputError

_REFUSED: tuple[tuple[str, str], ...] = (
    ("deepspeed|zero", "splits its moments over the ranks, by no parameter's bounds"),
    ("8bit|4bit|fp8", QUANTIZED),
    ("adafactor|^came$", FACTORED),
    ("adamax", "keeps a decayed maximum of gradients, not their mean square"),
    ("rmsprop", "keeps a mean square that is not bias-corrected, under another name"),
    ("lion", "keeps no second moment"),
    ("muon", "orthogonalises the momentum of matrices and keeps no second moment of them"),
    ("soap|shampoo", "keeps its moments in a rotated basis, not for single weights"),
    ("galore|apollo|fira", "keeps moments of projected gradients, not one value per weight"),
    ("sparseadam", "updates only the rows touched in a step, so each row has its own window"),
    ("sgd", "keeps no second moment"),
    ("adagrad", "sums squared gradients since the start instead of averaging the last ones"),
    ("adadelta", "keeps a mean square that is not bias-corrected, under another name"),
    ("lomo|rprop|lbfgs", "keeps no second moment"),
)  # fmt: skip
"""Class-name pattern -> why its state can't stand for a Fisher diagonal; the first match counts."""

_ADAM_FAMILY = {"Adam", "AdamW", "NAdam", "RAdam"}
"""Classes of torch.optim whose ``exp_avg_sq`` is beta2 v + (1 - beta2) g^2, elementwise."""


def unwrap_optimizer(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer that holds the state, out of Accelerate's wrapper.

    Raises InputError, naming class and reason, for optimizers that keep no usable moment.
    """
    refuse_optimizer(optimizer)
    while type(optimizer).__name__ == "AcceleratedOptimizer":
        optimizer = optimizer.optimizer  # type: ignore[attr-defined]
        refuse_optimizer(optimizer)
    return optimizer


def refuse_optimizer(optimizer: Optimizer) -> None:
    """Raise InputError, with the reason, for a class known to keep no elementwise second moment."""
    name = type(optimizer).__name__
    module = type(optimizer).__module__
    if module.startswith("bitsandbytes"):
        raise InputError(
            f"optimizer {name} of bitsandbytes {QUANTIZED}, and keeps 32-bit ones under names of "
            f"its own: {FIX}"
        )
    for pattern, reason in _REFUSED:
        if re.search(pattern, name.lower()):
            raise InputError(f"optimizer {name} {reason}: {FIX}")


def is_foreign(optimizer: Optimizer) -> bool:
    """Say whether the class isn't torch's own Adam, so that its ``exp_avg_sq`` is only presumed."""
    return type(optimizer).__name__ not in _ADAM_FAMILY or not type(
        optimizer
    ).__module__.startswith("torch.optim")


def second_moment(
    optimizer: Optimizer, name: str, parameter: nn.Parameter, state: Mapping[str, Any]
) -> Tensor:
    """Return one parameter's whole ``exp_avg_sq``, checked. Collective if it is a DTensor.

    Raises InputError if it is missing, factored, rotated, quantized, or not of the parameter's
    shape.
    """
    cls = type(optimizer).__name__
    refuse_keys(map(str, state), cls)
    moment = state.get("exp_avg_sq")
    if not isinstance(moment, Tensor):
        kept = ", ".join(sorted(map(str, state))) or "nothing"
        raise InputError(f"optimizer {cls} keeps {kept} but no exp_avg_sq for {name!r}: {FIX}")
    if moment.shape != parameter.shape:
        raise InputError(
            f"optimizer {cls}: exp_avg_sq of {name!r} has shape {tuple(moment.shape)} and the "
            "parameter "
            f"{tuple(parameter.shape)}, so it isn't one value per weight: {FIX}"
        )
    moment = whole_tensor(moment)
    if type(moment) not in (Tensor, nn.Parameter) or not moment.is_floating_point():
        raise InputError(
            f"optimizer {cls}: exp_avg_sq of {name!r} is {type(moment).__name__} of "
            f"{moment.dtype}, not plain "
            f"floating point: {FIX}"
        )
    return moment


def corrected_moments(optimizer: Optimizer, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield name and bias-corrected second moment of each parameter that has one, one at a time.

    Collective with sharded state. Raises InputError as ``second_moment``.
    """
    optimizer = unwrap_optimizer(optimizer)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in unique_parameters(model).items():
        state = optimizer.state.get(parameter, {})
        if id(parameter) in groups and state:
            group = groups[id(parameter)]
            moment = second_moment(optimizer, name, parameter, state)
            step = moment_step(optimizer, name, state, group)
            yield name, moment.detach() / (1 - moment_beta2(optimizer, group) ** step)


def moment_step(
    optimizer: Optimizer, name: str, state: Mapping[str, Any], group: Mapping[str, Any]
) -> int:
    """Return how many updates a moment has seen; some libraries count per parameter group."""
    step = state.get("step", group.get("step"))
    if step is None:
        raise InputError(
            f"optimizer {type(optimizer).__name__} keeps no step for {name!r}, so its moment can't "
            "be "
            f"bias-corrected: {FIX}"
        )
    count = int(whole_tensor(step) if isinstance(step, Tensor) else step)
    if count < 1:
        raise InputError(
            f"optimizer {type(optimizer).__name__}: the moment of {name!r} is at step {count}: "
            "take a step first"
        )
    return count


def moment_beta2(optimizer: Optimizer, group: Mapping[str, Any]) -> float:
    """Return the decay of a group's second moment; raises InputError unless it is in [0, 1)."""
    betas = group.get("betas")
    if not isinstance(betas, tuple | list) or len(betas) < 2 or not 0 <= float(betas[1]) < 1:
        raise InputError(
            f"optimizer {type(optimizer).__name__} has betas {betas!r}: beta2 in [0, 1) is needed "
            "for bias "
            f"correction: {FIX}"
        )
    return float(betas[1])


def couples_weight_decay(group: Mapping[str, Any]) -> bool:
    """Say whether weight decay is added to the gradient (L2 form) and so enters the moment."""
    return bool(group.get("weight_decay")) and not group.get("decoupled_weight_decay", False)


def implementation(group: Mapping[str, Any]) -> str:
    """Return which of torch's implementations of an optimizer a parameter group asks for."""
    if group.get("fused"):
        return "fused"
    if group.get("foreach"):
        return "foreach"
    if group.get("capturable"):
        return "capturable"
    return "default" if group.get("foreach") is None else "for-loop"
