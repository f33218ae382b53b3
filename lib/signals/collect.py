"""Hints of a model, from a signal measured on tokens: what ``tierhints collect`` does."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..hints import Hints
from .fisher import FisherTrace, save_fisher_diagonal
from .gradients import FisherLabels
from .interface import Measurement, Progress, Signal, signal_hints
from .router import RouterCounter, router_signals

BATCH_SIZE = 1
"""Sequences per draw: of the same text, more draws say more."""
HBM_THRESHOLD, CPU_THRESHOLD = 0.3, 0.8


def collect_fisher(
    model: nn.Module,
    tokens: Tensor,
    *,
    labels: FisherLabels | str = FisherLabels.SAMPLED,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    hbm_threshold: float = HBM_THRESHOLD,
    cpu_threshold: float = CPU_THRESHOLD,
    diagonal: str | Path | None = None,
    model_id: str | None = None,
    source: str = "",
    progress: Progress | None = None,
) -> Hints:
    """Measure the Fisher information of a causal language model on real text, and make its hints.

    ``tokens``: integer ids (N, T) without padding, such as those of ``read_tokens``. ``labels``:
    "sampled" from the model (true Fisher) or the text's own ("data", biased). ``batch_size``:
    sequences per backward pass; fewer are slower and, for the same text, more exact. ``seed``: of
    the sampled labels. The thresholds are cumulative shares of weight bytes at which the tiers HBM
    and CPU end. ``diagonal`` is a file that gets F_ii of every weight (safetensors, float32).
    ``model_id`` (default: the model's own name or path) and ``source``, where the text is from, are
    written into the hints. ``progress`` is called with the number of sequences done.

    The model is left as it was. Takes the memory of one gradient of it, of a batch's activations,
    and with ``diagonal`` of a float32 copy. Raises InputError for tokens that aren't the model's,
    and FloatingPointError where logits or gradients aren't finite.
    """
    signal = FisherTrace(labels=labels, keep_diagonal=diagonal is not None, seed=seed)
    hints, _ = collect_hints(
        model,
        tokens,
        signal,
        batch_size=batch_size,
        hbm_threshold=hbm_threshold,
        cpu_threshold=cpu_threshold,
        diagonal=diagonal,
        model_id=model_id,
        source=source,
        progress=progress,
    )
    return hints


def collect_hints(
    model: nn.Module,
    tokens: Tensor,
    signal: Signal,
    *,
    batch_size: int = BATCH_SIZE,
    hbm_threshold: float = HBM_THRESHOLD,
    cpu_threshold: float = CPU_THRESHOLD,
    diagonal: str | Path | None = None,
    model_id: str | None = None,
    source: str = "",
    progress: Progress | None = None,
) -> tuple[Hints, Measurement]:
    """Make hints by any signal, of a model in evaluation mode; returns also what was measured.

    As ``collect_fisher``; ``diagonal`` goes with a ``FisherTrace`` that keeps it. The hints of
    experts also have ``router_counts``, of all passes that the signal took.
    """
    if batch_size < 1:
        raise InputError(f"batch_size {batch_size} must be at least 1")
    with RouterCounter(model, training=False) as counter:
        found = signal.measure(model, torch.split(tokens, batch_size), progress=progress)
    counts = counter.fold()
    config: Any = getattr(model, "config", None)
    provenance: Mapping[str, Any] = {
        "data": source,
        "tokens_digest": f"sha256:{hashlib.sha256(tokens.cpu().numpy().tobytes()).hexdigest()}",
        "sequence_length": tokens.shape[1],
        "batch_size": batch_size,
        "diagonal": None if diagonal is None else Path(diagonal).name,
        **({"router_counts": "while collecting"} if counts else {}),
    }
    hints = signal_hints(
        found,
        model,
        model_id=getattr(config, "name_or_path", "") if model_id is None else model_id,
        revision=getattr(config, "_commit_hash", None) or "",
        hbm_threshold=hbm_threshold,
        cpu_threshold=cpu_threshold,
        extra_signals=router_signals(counts),
        extra_provenance=provenance,
    )
    if diagonal is not None:
        assert isinstance(signal, FisherTrace) and signal.result is not None
        assert hints.model is not None
        digest = hints.model.parameter_digest
        save_fisher_diagonal(signal.result, diagonal, parameter_digest=digest)
    return hints, found
