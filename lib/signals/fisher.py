"""Fisher information of a causal language model, per token: diagonal per weight, trace per block.

Per token and weight i, F_ii = E[(d log p(y | x) / d w_i)^2]. Two estimators, told apart wherever
they are recorded:

- ``sampled``, the true Fisher: labels y are drawn at every position from the model's own
  distribution. Their gradients are independent and have mean zero given the text, so the square of
  the *summed* gradient of a batch has the sum of the squares as its expectation: one backward pass
  per batch is unbiased (Gauss-Newton-Bartlett; Liu et al. 2023, "Sophia", arXiv 2305.14342).
- ``data``, the empirical Fisher: labels are the text's next tokens, and the gradient of each
  *sequence* is squared. It is biased: gradients of data labels have a mean that isn't zero away
  from convergence, and correlate inside a sequence, and both add to it (Kunstner et al. 2019, arXiv
  1905.12558). It is what Adam's moment estimates.

Neither is Adam's moment (``adam``) nor the Fisher information of attention probabilities
(``attention``).
"""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..blocks import partition_model
from ..errors import InputError
from ..hints import Hints
from .gradients import FisherLabels, GradientSampler
from .interface import Measurement, Progress, register_signal, signal_hints
from .summary import (
    SignalValue,
    block_masses,
    dtype_names,
    packed_parameters,
    ratio_stderr,
    sum_elements,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FisherResult:
    """Fisher information per token, and what it was estimated from."""

    trace: Mapping[str, float]
    """Block -> sum of F_ii over its weights."""
    trace_stderr: Mapping[str, float] | None
    """Block -> standard error of the trace over the draws; None with a single draw."""
    diagonal: Mapping[str, Tensor] | None
    """Parameter -> F_ii, float32 on the CPU, of the parameter's shape."""
    labels: FisherLabels
    tokens: int
    sequences: int
    draws: int
    """Squared gradients averaged: batches with sampled labels, sequences with data labels."""
    seed: int | None
    """Seed of the sampled labels."""


def measure_fisher(
    model: nn.Module,
    batches: Iterable[Tensor],
    *,
    labels: FisherLabels | str = FisherLabels.SAMPLED,
    keep_diagonal: bool = False,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> FisherResult:
    """Estimate the Fisher information of every weight, trained or frozen, on tokens of real text.

    ``batches``: integer tensors of shape (B, T) without padding. ``model(input_ids=...)`` returns
    logits of shape (B, T, V), as a tensor or as ``.logits``; position t of the logits is the
    distribution of token t + 1, so sampled labels use all T positions and data labels T - 1.
    ``progress`` is called with the number of sequences done. Smaller batches mean more draws of
    sampled labels from the same text, and a smaller error.

    Runs in evaluation mode (no dropout) without autocast, and leaves training flags,
    ``requires_grad``, ``.grad`` and torch's global random state as they were. Peak memory above the
    weights: one gradient of the model, the activations of a batch, and with ``keep_diagonal`` a
    float32 copy of the model. Raises InputError for bad tokens, for weights that have no gradient
    (quantized, sharded, offloaded), and FloatingPointError if logits or gradients aren't finite.
    """
    sampler = GradientSampler(model, labels=labels, seed=seed)
    labels = sampler.labels
    blocks = partition_model(sampler.model)
    packed = packed_parameters(blocks)
    diagonal = (
        {name: torch.zeros_like(p, dtype=torch.float32) for name, p in sampler.parameters.items()}
        if keep_diagonal
        else None
    )
    draws: list[tuple[int, dict[str, float]]] = []
    sequences = 0
    with sampler:
        for batch in batches:
            for draw in sampler.draws(batch):
                sums: dict[str, Tensor] = {}
                for name, gradient in draw.gradients.items():
                    dtype = torch.promote_types(gradient.dtype, torch.float32)
                    squares = gradient.to(dtype).square()
                    sums[name] = sum_elements(squares, per_expert=name in packed)
                    if not bool(sums[name].isfinite().all()):
                        raise FloatingPointError(
                            f"the gradient of {name!r} isn't finite once squared in {dtype}"
                        )
                    if diagonal is not None:
                        diagonal[name] += squares
                draws.append((draw.tokens, block_masses(blocks, sums)))
                sequences += draw.sequences
                if progress is not None:
                    progress(draw.sequences)
    if not draws:
        raise InputError("no text to measure Fisher information on: give at least one batch")
    total = sum(tokens for tokens, _ in draws)
    trace = {block.name: sum(mass[block.name] for _, mass in draws) / total for block in blocks}
    counts = [tokens for tokens, _ in draws]
    stderr = {
        block.name: ratio_stderr([mass[block.name] for _, mass in draws], counts)
        for block in blocks
    }
    return FisherResult(
        trace=trace,
        trace_stderr=stderr if len(draws) > 1 else None,
        diagonal=None
        if diagonal is None
        else {name: (value / total).cpu() for name, value in diagonal.items()},
        labels=labels,
        tokens=total,
        sequences=sequences,
        draws=len(draws),
        seed=seed if labels is FisherLabels.SAMPLED else None,
    )


def fisher_hints(
    result: FisherResult,
    model: nn.Module,
    *,
    model_id: str,
    revision: str = "",
    hbm_threshold: float,
    cpu_threshold: float,
    extra_signals: Mapping[str, Mapping[str, SignalValue]] | None = None,
    extra_provenance: Mapping[str, Any] | None = None,
) -> Hints:
    """Make hints from a Fisher measurement of ``model``: ``signal_hints`` of
    ``fisher_measurement``, blocks ranked by mean F_ii per weight.
    """
    return signal_hints(
        fisher_measurement(result, model),
        model,
        model_id=model_id,
        revision=revision,
        hbm_threshold=hbm_threshold,
        cpu_threshold=cpu_threshold,
        extra_signals=extra_signals,
        extra_provenance=extra_provenance,
    )


def fisher_measurement(result: FisherResult, model: nn.Module) -> Measurement:
    """Put a Fisher measurement of ``model`` into the form that every signal has.

    The provenance's signal is ``fisher_diag`` if the diagonal was kept and ``fisher_trace``
    otherwise; the ranking is the same.
    """
    blocks = partition_model(model)
    if result.trace.keys() != {block.name for block in blocks}:
        raise InputError("the Fisher measurement is of another model: its blocks have other names")
    signals: dict[str, dict[str, float]] = {}
    for block in blocks:
        signals[block.name] = {"fisher_trace": result.trace[block.name]}
        if result.trace_stderr is not None:
            signals[block.name]["fisher_trace_stderr"] = result.trace_stderr[block.name]
    return Measurement(
        mass=result.trace,
        density={block.name: result.trace[block.name] / block.num_params for block in blocks},
        signals=signals,
        provenance={
            "signal": "fisher_trace" if result.diagonal is None else "fisher_diag",
            "labels": str(result.labels),
            "estimator": "true Fisher, squared gradient of the summed loss per batch"
            if result.labels is FisherLabels.SAMPLED
            else "empirical Fisher, squared gradient of the summed loss per sequence (biased)",
            "tokens": result.tokens,
            "sequences": result.sequences,
            "draws": result.draws,
            "seed": result.seed,
            "dtype": dtype_names(model),
        },
    )


@register_signal
class FisherTrace:
    """``measure_fisher`` as a registered signal; ``result`` is what it measured last."""

    name: ClassVar[str] = "fisher_trace"

    def __init__(
        self,
        *,
        labels: FisherLabels | str = FisherLabels.SAMPLED,
        keep_diagonal: bool = False,
        seed: int = 0,
    ) -> None:
        self._labels, self._keep_diagonal, self._seed = labels, keep_diagonal, seed
        self.result: FisherResult | None = None

    def measure(
        self, model: nn.Module, batches: Iterable[Tensor], *, progress: Progress | None = None
    ) -> Measurement:
        """Estimate the trace of every block."""
        self.result = measure_fisher(
            model,
            batches,
            labels=self._labels,
            keep_diagonal=self._keep_diagonal,
            seed=self._seed,
            progress=progress,
        )
        return fisher_measurement(self.result, model)


def save_fisher_diagonal(result: FisherResult, path: str | Path, *, parameter_digest: str) -> None:
    """Write the diagonal as safetensors, parameter name -> float32 F_ii per token; atomic.

    The metadata holds the labels, tokens, and the digest of the weights it was measured on. Raises
    InputError if no diagonal was kept.
    """
    from safetensors.torch import save_file

    if result.diagonal is None:
        raise InputError("no Fisher diagonal was kept: collect with keep_diagonal=True")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file(
            {name: value.contiguous() for name, value in result.diagonal.items()},
            partial,
            metadata={
                "signal": "fisher_diag",
                "labels": str(result.labels),
                "tokens": str(result.tokens),
                "parameter_digest": parameter_digest,
            },
        )
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
