"""evaluate(): what placing and compressing a model costs in quality, on text of one's own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..precision.quality import Quality
from ..tiering import attach
from ..tiering.planning.budget import Budget
from ..tiering.planning.inputs import HintsGiven
from ..tiering.planning.needs import PrecisionChoice
from .full_model import FullModel

LEAST_SEQUENCES = 2
"""An interval needs them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The placed model against the full one, and how it was placed."""

    quality: Quality
    bytes_per_tier: Mapping[str, int]
    peak_weight_bytes: int
    """The most that weights took of fast memory."""
    precisions: Mapping[str, int]
    """Precision -> number of blocks held in it."""
    predicted_nats: float | None
    """KL per token that calibrated hints predict of it; None without such hints."""
    bound_nats: float | None
    """What calibration promises that the KL does not exceed."""
    besides: tuple[Any, Any]
    """What ``also`` returned of the full model and of the placed one; None without it."""


def evaluate(
    model: nn.Module,
    tokens: Tensor,
    hints: HintsGiven = None,
    *,
    budget: Budget | None = None,
    precision: PrecisionChoice = None,
    epsilon: float | str | None = None,
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    also: Callable[[], Any] | None = None,
) -> Evaluation:
    """Measure a causal language model as it is, then with its weights placed and stored as asked.

    ``tokens``: integer ids (N, T) without padding, of at least 2 sequences. ``hints``, ``budget``,
    ``precision``, ``epsilon`` and ``device`` are those of ``attach``. ``batch_size``: sequences per
    forward pass (default: by memory). ``also`` is run on the full model and on the placed one.

    The model is in evaluation mode, and detached afterwards. The full model's logits are kept in
    the temporary folder meanwhile. Raises what ``attach`` raises, InputError for tokens that aren't
    the model's, and FloatingPointError where logits aren't finite.
    """
    if hints is None and budget is None:
        raise InputError("nothing says where weights go: give hints, or a budget")
    if len(tokens) < LEAST_SEQUENCES:
        raise InputError(
            f"{len(tokens)} sequences are too few for an interval: give {LEAST_SEQUENCES} or more"
        )
    full = FullModel(model, tokens, batch_size=batch_size)
    besides_full = also() if also is not None else None
    with attach(
        model, hints, budget=budget, precision=precision, epsilon=epsilon, device=device
    ) as runtime:
        quality = full.compare(device)
        besides_placed = also() if also is not None else None
        stats = runtime.stats()
        veto = runtime.veto.to_json()
        held = [str(place.precision) for place in runtime.plan.placements.values()]
    return Evaluation(
        quality=quality,
        bytes_per_tier=stats.bytes_per_tier,
        peak_weight_bytes=stats.peak_resident_bytes,
        precisions={name: held.count(name) for name in dict.fromkeys(held)},
        predicted_nats=veto["predicted_nats"],
        bound_nats=veto["bound_nats"],
        besides=(besides_full, besides_placed),
    )
