"""Adam's second moment as a signal: free with training, one number per weight.

The bias-corrected moment v_hat = exp_avg_sq / (1 - beta2^step) averages the squared gradient of the
last 1/(1 - beta2) steps. Its mean over a block ranks blocks; its scale depends on the tokens per
update and on gradient clipping, and only where both are known is it turned into a per-token Fisher
trace (formula and source in ``scale``). What else bends it is recorded or refused.
"""

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..blocks import unique_parameters
from ..errors import InputError
from ..hints import Hints
from .moment_signal import AdamSignal, MomentSums, check_scale, moment_hints, warn_of_state
from .optimizers import (
    couples_weight_decay,
    implementation,
    is_foreign,
    moment_beta2,
    moment_step,
    second_moment,
    unwrap_optimizer,
)
from .summary import SignalValue, refuse_fsdp1, reshard

_FROZEN = "frozen, so Adam keeps no moment"


def collect_adam_signal(optimizer: Optimizer, model: nn.Module) -> AdamSignal:
    """Read the bias-corrected second moment of every block of ``model`` from its optimizer's state.

    One parameter is gathered at a time; with sharded (DTensor) state the call is collective: every
    rank must make it. Warns about state that is read but may mislead. Raises InputError for
    optimizers without a full elementwise second moment, for FSDP1, before the first step, if no
    parameter is trained, and if a moment isn't finite.
    """
    refuse_fsdp1(model)
    reshard(model)
    optimizer = unwrap_optimizer(optimizer)
    parameters = unique_parameters(model)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    sums = MomentSums(model)
    read_groups: list[Mapping[str, Any]] = []
    for name, parameter in parameters.items():
        group = groups.get(id(parameter))
        state = optimizer.state.get(parameter, {})
        if group is None:
            sums.skip(name, "not in the optimizer" if parameter.requires_grad else _FROZEN)
        elif not state:
            sums.skip(name, "without a gradient so far" if parameter.requires_grad else _FROZEN)
        else:
            moment = second_moment(optimizer, name, parameter, state)
            step = moment_step(optimizer, name, state, group)
            sums.add(name, moment, steps=(step,), beta2=moment_beta2(optimizer, group))
            read_groups.append(group)
    if not read_groups or not any(parameter.requires_grad for parameter in parameters.values()):
        raise InputError(_nothing_read(optimizer, parameters, groups))
    signal = sums.signal(
        optimizer=type(optimizer).__name__,
        foreign=is_foreign(optimizer),
        implementation="+".join(sorted({implementation(group) for group in read_groups})),
        amsgrad=any(bool(group.get("amsgrad")) for group in read_groups),
        coupled_weight_decay=not is_foreign(optimizer)
        and any(couples_weight_decay(group) for group in read_groups),
    )
    warn_of_state(signal)
    return signal


def adam_hints(
    optimizer: Optimizer,
    model: nn.Module,
    *,
    model_id: str,
    revision: str = "",
    hbm_threshold: float,
    cpu_threshold: float,
    tokens_per_update: float | None = None,
    clip: float | None = None,
    mean_clip_sq: float | None = None,
    accumulation: int | None = None,
    world_size: int | None = None,
    global_step: int | None = None,
    extra_signals: Mapping[str, Mapping[str, SignalValue]] | None = None,
    extra_provenance: Mapping[str, Any] | None = None,
) -> Hints:
    """Make hints from the optimizer's second moment (collective under FSDP2, same on all ranks).

    ``tokens_per_update``: tokens that the loss of one optimizer step averaged, over accumulation
    and all processes. ``clip``: largest gradient norm, 0 if clipping was off, None if unknown.
    ``mean_clip_sq``: mean square of the clip coefficient over the moment's window
    (``MomentScale.values`` gives both); known to be 1 without clipping. ``global_step``: steps the
    trainer has taken, to detect moments that were reset. What is None is recorded as unknown, and
    ``fisher_trace`` is then left out. ``extra_signals``: block -> name -> value, written beside;
    ``extra_provenance``: added to the provenance. Raises InputError as ``collect_adam_signal``
    does, and for values out of range.
    """
    if clip == 0 and mean_clip_sq is None:
        mean_clip_sq = 1.0
    check_scale(tokens_per_update, mean_clip_sq, clip)
    signal = collect_adam_signal(optimizer, model)
    reset = global_step is not None and signal.step < global_step
    if reset:
        warnings.warn(
            f"the moments have seen {signal.step} updates of {global_step} steps: they were reset "
            "or not restored",
            stacklevel=2,
        )
    return moment_hints(
        signal,
        model,
        model_id=model_id,
        revision=revision,
        hbm_threshold=hbm_threshold,
        cpu_threshold=cpu_threshold,
        tokens_per_update=tokens_per_update,
        mean_clip_sq=mean_clip_sq,
        reset=reset,
        extra_signals=extra_signals,
        extra_provenance={
            "global_step": global_step,
            "moments_reset": None if global_step is None else reset,
            "clip": clip,
            "accumulation": accumulation,
            "world_size": world_size,
            **(extra_provenance or {}),
        },
    )


def _nothing_read(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], groups: Mapping[int, Any]
) -> str:
    """Say why not one moment was found."""
    cls = type(optimizer).__name__
    if not any(parameter.requires_grad for parameter in parameters.values()):
        return "every parameter is frozen: measure the checkpoint with tierhints collect"
    if not any(id(parameter) in groups for parameter in parameters.values()):
        return f"{cls} holds no parameter of this model: give the model that it trains"
    return f"{cls} has no state for this model yet: call it after the first optimizer.step()"
