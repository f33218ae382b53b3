"""Adam's second moment summed per block: what is known of its making, and what bends it.

``adam`` reads it from a live optimizer, ``from_checkpoint`` from an optimizer state on disk.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import Block, Piece, partition_model, unique_parameters
from ..errors import InputError
from ..hints import Hints
from .summary import (
    SignalValue,
    block_masses,
    dtype_names,
    make_hints,
    packed_parameters,
    sum_elements,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamSignal:
    """An optimizer's second moment, summed per block, and what its state says of its making."""

    blocks: tuple[Block, ...]
    mass: Mapping[str, float]
    """Block -> sum of v_hat over its weights that have a moment."""
    measured_params: Mapping[str, int]
    """Block -> number of its weights that have a moment."""
    steps: Mapping[str, tuple[int, int]]
    """Block with a moment -> smallest and largest update count of its parameters."""
    reasons: Mapping[str, str]
    """Block -> why it has no moment, only a part of one, or one that was left behind."""
    optimizer: str
    foreign: bool
    implementation: str
    beta2: tuple[float, ...]
    step: int
    amsgrad: bool
    coupled_weight_decay: bool | None
    """Whether weight decay enters the moment; None: unknown."""
    moment_dtype: str

    @property
    def density(self) -> dict[str, float | None]:
        """Block -> mean v_hat per weight that has a moment, or None if none has."""
        return {
            name: self.mass[name] / count if count else None
            for name, count in self.measured_params.items()
        }

    @property
    def uniform_steps(self) -> bool:
        """Whether every moment has seen all updates of the optimizer."""
        return all(low == high == self.step for low, high in self.steps.values())


class MomentSums:
    """Adds moments up, one parameter after another, so that one at a time is in memory."""

    def __init__(self, model: nn.Module) -> None:
        self._blocks = partition_model(model)
        self._parameters = unique_parameters(model)
        self._packed = packed_parameters(self._blocks)
        self._sums: dict[str, Tensor] = {}
        self._steps: dict[str, tuple[int, ...]] = {}
        self._missing: dict[str, str] = {}
        self._dtypes: set[torch.dtype] = set()
        self._beta2: set[float] = set()

    def add(self, name: str, moment: Tensor, *, steps: tuple[int, ...], beta2: float) -> None:
        """Add a parameter's ``exp_avg_sq``. ``steps``: the updates that it has seen, one number or
        one per expert. Raises InputError if it isn't finite.
        """
        corrections = torch.tensor([1 - beta2**step for step in steps], dtype=torch.float64)
        correction = corrections if len(steps) > 1 else corrections[0]
        self._sums[name] = sum_elements(moment, per_expert=name in self._packed) / correction
        if not bool(self._sums[name].isfinite().all()):
            raise InputError(
                f"exp_avg_sq of {name!r} isn't finite: the training run diverged; go back to a "
                "checkpoint"
            )
        self._steps[name] = steps
        self._dtypes.add(moment.dtype)
        self._beta2.add(beta2)

    def skip(self, name: str, reason: str) -> None:
        """Say why a parameter has no moment."""
        self._missing[name] = reason

    def signal(
        self,
        *,
        optimizer: str,
        foreign: bool,
        implementation: str,
        amsgrad: bool,
        coupled_weight_decay: bool | None,
    ) -> AdamSignal:
        """Return what was added, by block, with what is known of the optimizer."""
        last = max(max(steps) for steps in self._steps.values())
        stopped = {
            name: max(seen)
            for name, seen in self._steps.items()
            if max(seen) < last and not self._parameters[name].requires_grad
        }
        return AdamSignal(
            blocks=self._blocks,
            mass=block_masses(self._blocks, self._sums),
            measured_params={
                block.name: sum(p.num_params for p in block.pieces if p.parameter in self._sums)
                for block in self._blocks
            },
            steps=_block_steps(self._blocks, self._steps),
            reasons=_gap_reasons(self._blocks, self._missing, stopped),
            optimizer=optimizer,
            foreign=foreign,
            implementation=implementation,
            beta2=tuple(sorted(self._beta2)),
            step=last,
            amsgrad=amsgrad,
            coupled_weight_decay=coupled_weight_decay,
            moment_dtype="+".join(
                sorted(str(dtype).removeprefix("torch.") for dtype in self._dtypes)
            ),
        )


def moment_hints(
    signal: AdamSignal,
    model: nn.Module,
    *,
    model_id: str,
    revision: str,
    hbm_threshold: float,
    cpu_threshold: float,
    tokens_per_update: float | None,
    mean_clip_sq: float | None,
    reset: bool = False,
    parameter_digest: str | None = None,
    extra_signals: Mapping[str, Mapping[str, SignalValue]] | None = None,
    extra_provenance: Mapping[str, Any],
) -> Hints:
    """Make hints of a moment's sums; ``fisher_trace`` where its scale is known. ``reset``: whether
    moments were lost in training. ``parameter_digest``: for a model without weights in memory.
    """
    obstacle = _scale_obstacle(signal, tokens_per_update, mean_clip_sq, reset=reset)
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
            "uniform_steps": signal.uniform_steps,
            "bias_corrected": True,
            "amsgrad": signal.amsgrad,
            "weight_decay_in_moment": signal.coupled_weight_decay,
            "moment_dtype": signal.moment_dtype,
            "dtype": dtype_names(model),
            "mean_clip_sq": mean_clip_sq,
            "tokens_per_update": tokens_per_update,
            "fisher_trace": f"left out: {obstacle}" if obstacle else "estimated from the moment",
            **extra_provenance,
        },
        density=signal.density,
        signals=signals,
        reasons=signal.reasons,
        hbm_threshold=hbm_threshold,
        cpu_threshold=cpu_threshold,
        parameter_digest=parameter_digest,
        extra_signals=extra_signals,
    )


def check_scale(
    tokens_per_update: float | None, mean_clip_sq: float | None, clip: float | None
) -> None:
    """Raise InputError for a scale that can't be."""
    if tokens_per_update is not None and not 0 < tokens_per_update < float("inf"):
        raise InputError(f"tokens_per_update {tokens_per_update} must be positive and finite")
    if mean_clip_sq is not None and not 0 < mean_clip_sq <= 1:
        raise InputError(f"mean_clip_sq {mean_clip_sq} must be in (0, 1]: clipping never enlarges")
    if clip is not None and not 0 <= clip < float("inf"):
        raise InputError(f"clip {clip} must be a gradient norm, or 0 for no clipping")


def _scale_obstacle(
    signal: AdamSignal,
    tokens_per_update: float | None,
    mean_clip_sq: float | None,
    *,
    reset: bool,
) -> str | None:
    """Say why v_hat can't be turned into a per-token Fisher trace, or None if it can."""
    if signal.foreign:
        return f"{signal.optimizer} isn't torch's Adam, its moment may be scaled otherwise"
    if signal.coupled_weight_decay:
        return "weight decay enters the moment (coupled L2 decay): use AdamW"
    if "float16" in signal.moment_dtype:
        return f"moments in {signal.moment_dtype} lose small updates"
    if reset:
        return "the moments were reset during training"
    if tokens_per_update is None:
        return "tokens per update unknown"
    if mean_clip_sq is None:
        return "mean squared clip coefficient unknown"
    return None


def _block_steps(
    blocks: tuple[Block, ...], steps: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, int]]:
    """Return smallest and largest update count of each block with a moment."""

    def seen(piece: Piece) -> int:
        counts = steps[piece.parameter]
        return counts[0] if piece.expert is None or len(counts) == 1 else counts[piece.expert]

    found: dict[str, tuple[int, int]] = {}
    for block in blocks:
        counts = [seen(piece) for piece in block.pieces if piece.parameter in steps]
        if counts:
            found[block.name] = (min(counts), max(counts))
    return found


def _gap_reasons(
    blocks: tuple[Block, ...], missing: Mapping[str, str], stopped: Mapping[str, int]
) -> dict[str, str]:
    """Explain blocks of which not every parameter has a moment, or not one that goes on.

    ``stopped``: parameter that was frozen in mid-training -> updates that its moment has seen.
    """
    reasons: dict[str, str] = {}
    for block in blocks:
        without = [piece for piece in block.pieces if piece.parameter in missing]
        if not without:
            seen = sorted({stopped[p.parameter] for p in block.pieces if p.parameter in stopped})
            if seen:
                counts = " and ".join(map(str, seen))
                reasons[block.name] = f"frozen after {counts} updates: the moment is of that time"
            continue
        why = ", ".join(dict.fromkeys(missing[piece.parameter] for piece in without))
        trained = block.num_params - sum(piece.num_params for piece in without)
        reasons[block.name] = (
            f"mean over the {trained} trained of {block.num_params} weights, the rest is {why}"
            if trained
            else why
        ) + " (tierhints collect measures it)"
    return reasons


def warn_of_state(signal: AdamSignal) -> None:
    """Warn, in the name of the caller's caller, about state that is read but may mislead."""
    if signal.foreign:
        warnings.warn(
            f"optimizer {signal.optimizer} isn't torch's Adam: its exp_avg_sq is taken for an "
            "elementwise mean square",
            stacklevel=3,
        )
    if signal.coupled_weight_decay:
        warnings.warn(
            f"{signal.optimizer} adds weight decay to the gradient, so the moment holds it too: "
            "use AdamW",
            stacklevel=3,
        )
    if "float16" in signal.moment_dtype:
        warnings.warn(
            f"moments are kept in {signal.moment_dtype}, which loses updates much smaller than the "
            "moment",
            stacklevel=3,
        )
    if not signal.uniform_steps:
        behind = [name for name, (low, _) in signal.steps.items() if low < signal.step]
        warnings.warn(
            f"{len(behind)} blocks ({behind[0]}, ...) have moments of fewer than {signal.step} "
            "updates: they were "
            "reset, frozen, or had no gradient in some steps",
            stacklevel=3,
        )
