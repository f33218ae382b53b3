"""Adam's second moment as a signal: free with training, one number per weight.

The bias-corrected moment v_hat = exp_avg_sq / (1 - beta2^step) averages the squared gradient of the
last 1/(1 - beta2) steps. Its mean over a block ranks blocks; its scale depends on the tokens per
update and on gradient clipping, and only where both are known is it turned into a per-token Fisher
trace (formula and source in ``scale``). What else bends it is recorded or refused.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..blocks import partition_model, unique_parameters
from ..errors import InputError
from ..hints import Hints
from .moment_signal import (
    AdamSignal,
    block_steps,
    check_scale,
    gap_reasons,
    scale_obstacle,
    warn_of_state,
)
from .optimizers import (
    couples_weight_decay,
    implementation,
    is_foreign,
    moment_beta2,
    moment_step,
    second_moment,
    unwrap_optimizer,
)
from .summary import (
    SignalValue,
    block_masses,
    dtype_names,
    make_hints,
    packed_parameters,
    refuse_fsdp1,
    reshard,
    sum_elements,
)

_FROZEN = "frozen, so Adam keeps no moment"
_LOW_PRECISION = (torch.bfloat16, torch.float16)


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
    blocks = partition_model(model)
    parameters = unique_parameters(model)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    packed = packed_parameters(blocks)
    sums: dict[str, Tensor] = {}
    steps: dict[str, int] = {}
    missing: dict[str, str] = {}
    dtypes: set[torch.dtype] = set()
    read_groups: list[Mapping[str, Any]] = []
    for name, parameter in parameters.items():
        group = groups.get(id(parameter))
        state = optimizer.state.get(parameter, {})
        if group is None:
            missing[name] = "not in the optimizer" if parameter.requires_grad else _FROZEN
        elif not state:
            missing[name] = "without a gradient so far" if parameter.requires_grad else _FROZEN
        else:
            moment = second_moment(optimizer, name, parameter, state)
            steps[name] = moment_step(optimizer, name, state, group)
            correction = 1 - moment_beta2(optimizer, group) ** steps[name]
            sums[name] = sum_elements(moment, per_expert=name in packed) / correction
            if not bool(sums[name].isfinite().all()):
                raise InputError(
                    f"exp_avg_sq of {name!r} isn't finite: the training run diverged; go back to a "
                    "checkpoint"
                )
            dtypes.add(moment.dtype)
            read_groups.append(group)
    if not sums or not any(parameter.requires_grad for parameter in parameters.values()):
        raise InputError(_nothing_read(optimizer, parameters, groups))
    last = max(steps.values())
    stopped = {
        name: seen
        for name, seen in steps.items()
        if seen < last and not parameters[name].requires_grad
    }
    signal = AdamSignal(
        blocks=blocks,
        mass=block_masses(blocks, sums),
        measured_params={
            block.name: sum(p.num_params for p in block.pieces if p.parameter in sums)
            for block in blocks
        },
        steps=block_steps(blocks, steps),
        reasons=gap_reasons(blocks, missing, stopped),
        optimizer=type(optimizer).__name__,
        foreign=is_foreign(optimizer),
        implementation="+".join(sorted({implementation(group) for group in read_groups})),
        beta2=tuple(sorted({moment_beta2(optimizer, group) for group in read_groups})),
        step=last,
        amsgrad=any(bool(group.get("amsgrad")) for group in read_groups),
        coupled_weight_decay=not is_foreign(optimizer)
        and any(couples_weight_decay(group) for group in read_groups),
        moment_dtype="+".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)),
    )
    warn_of_state(signal, low_precision=not dtypes.isdisjoint(_LOW_PRECISION))
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
    obstacle = scale_obstacle(signal, tokens_per_update, mean_clip_sq, reset=reset)
    signals: dict[str, dict[str, float]] = {}
    for block in signal.blocks:
        density = signal.density[block.name]
        if density is None:
            continue
        mass = signal.mass[block.name]
        signals[block.name] = {"adam_exp_avg_sq": density, "adam_exp_avg_sq_sum": mass}
        whole = signal.measured_params[block.name] == block.num_params
        in_step = signal.steps[block.name] == (signal.step, signal.step)
        if obstacle is None and whole and in_step:
            assert tokens_per_update is not None and mean_clip_sq is not None
            signals[block.name]["fisher_trace"] = mass * tokens_per_update / mean_clip_sq
    return make_hints(
        model,
        signal.blocks,
        model_id=model_id,
        revision=revision,
        provenance={
            "signal": "adam_exp_avg_sq",
            "optimizer": signal.optimizer,
            "foreign_optimizer": signal.foreign,
            "implementation": signal.implementation,
            "beta2": signal.beta2[0] if len(signal.beta2) == 1 else list(signal.beta2),
            "window_steps": round(1 / (1 - max(signal.beta2)), 3),
            "step": signal.step,
            "global_step": global_step,
            "moments_reset": None if global_step is None else reset,
            "uniform_steps": signal.uniform_steps,
            "bias_corrected": True,
            "amsgrad": signal.amsgrad,
            "weight_decay_in_moment": signal.coupled_weight_decay,
            "moment_dtype": signal.moment_dtype,
            "dtype": dtype_names(model),
            "clip": clip,
            "mean_clip_sq": mean_clip_sq,
            "tokens_per_update": tokens_per_update,
            "accumulation": accumulation,
            "world_size": world_size,
            "fisher_trace": f"left out: {obstacle}" if obstacle else "estimated from the moment",
            **(extra_provenance or {}),
        },
        density=signal.density,
        signals=signals,
        reasons=signal.reasons,
        hbm_threshold=hbm_threshold,
        cpu_threshold=cpu_threshold,
        extra_signals=extra_signals,
    )  # fmt: skip


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
