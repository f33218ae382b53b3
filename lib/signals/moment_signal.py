"""Adam's second moment summed per block: what is known of its making, and what bends it.

``adam`` reads it from a live optimizer.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from ..blocks import Block
from ..errors import InputError


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
    coupled_weight_decay: bool
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


def scale_obstacle(
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


def block_steps(blocks: tuple[Block, ...], steps: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Return smallest and largest update count of each block with a moment."""
    found: dict[str, tuple[int, int]] = {}
    for block in blocks:
        counts = [steps[piece.parameter] for piece in block.pieces if piece.parameter in steps]
        if counts:
            found[block.name] = (min(counts), max(counts))
    return found


def gap_reasons(
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


def warn_of_state(signal: AdamSignal, *, low_precision: bool) -> None:
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
    if low_precision:
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
