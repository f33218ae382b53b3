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

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..blocks import partition_model, unique_parameters, unwrap_model
from ..errors import InputError
from ..hints import Hints
from .summary import (
    SignalValue,
    block_masses,
    causal_logits,
    check_token_ids,
    dtype_names,
    make_hints,
    packed_parameters,
    refuse_fsdp1,
    sum_elements,
)


class FisherLabels(StrEnum):
    """Where the labels of the log-likelihood come from."""

    SAMPLED = "sampled"
    DATA = "data"


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


def collect_fisher(
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
    try:
        labels = FisherLabels(labels)
    except ValueError as error:
        raise InputError(f"Fisher labels {labels!r}: allowed are sampled, data") from error
    model = unwrap_model(model)
    blocks = partition_model(model)
    parameters = unique_parameters(model)
    _check_measurable(model, parameters)
    device = next(iter(parameters.values())).device
    packed = packed_parameters(blocks)
    generators: dict[torch.device, torch.Generator] = {}
    diagonal = (
        {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
        if keep_diagonal
        else None
    )
    draws: list[tuple[int, dict[str, float]]] = []
    sequences = 0
    with _measuring(model, parameters):
        for batch in batches:
            _check_batch(batch, labels, model)
            for ids in torch.split(batch, len(batch) if labels is FisherLabels.SAMPLED else 1):
                loss, tokens = _summed_loss(model, ids.to(device), labels, generators, seed)
                sums: dict[str, Tensor] = {}
                for name, squares in _squared_gradients(loss, parameters):
                    sums[name] = sum_elements(squares, per_expert=name in packed)
                    if not bool(sums[name].isfinite().all()):
                        raise FloatingPointError(
                            f"the gradient of {name!r} isn't finite: {_overflow_hint(model)}"
                        )
                    if diagonal is not None:
                        diagonal[name] += squares
                draws.append((tokens, block_masses(blocks, sums)))
                sequences += len(ids)
                if progress is not None:
                    progress(len(ids))
    if not draws:
        raise InputError("no text to measure Fisher information on: give at least one batch")
    total = sum(tokens for tokens, _ in draws)
    trace = {block.name: sum(mass[block.name] for _, mass in draws) / total for block in blocks}
    return FisherResult(
        trace=trace,
        trace_stderr=_standard_errors(draws, trace, total),
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
    """Make hints from a Fisher measurement of ``model``; blocks are ranked by mean F_ii per weight.

    The provenance's signal is ``fisher_diag`` if the diagonal was kept and ``fisher_trace``
    otherwise; the ranking is the same. ``extra_signals``: block -> name -> value, written beside;
    ``extra_provenance``: added to the provenance.
    """
    blocks = partition_model(model)
    if result.trace.keys() != {block.name for block in blocks}:
        raise InputError("the Fisher measurement is of another model: its blocks have other names")
    signals: dict[str, dict[str, float]] = {}
    for block in blocks:
        signals[block.name] = {"fisher_trace": result.trace[block.name]}
        if result.trace_stderr is not None:
            signals[block.name]["fisher_trace_stderr"] = result.trace_stderr[block.name]
    return make_hints(
        model,
        blocks,
        model_id=model_id,
        revision=revision,
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
            **(extra_provenance or {}),
        },
        density={block.name: result.trace[block.name] / block.num_params for block in blocks},
        signals=signals,
        reasons={},
        hbm_threshold=hbm_threshold,
        cpu_threshold=cpu_threshold,
        extra_signals=extra_signals,
    )


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


@contextmanager
def _measuring(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Set evaluation mode, gradients for all parameters and no autocast; restore afterwards."""
    training = [module for module in model.modules() if module.training]
    frozen = [parameter for parameter in parameters.values() if not parameter.requires_grad]
    device_types = {parameter.device.type for parameter in parameters.values()}
    try:
        model.eval()
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.enable_grad(), _no_autocast(sorted(device_types)):
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for module in training:
            module.training = True


@contextmanager
def _no_autocast(device_types: list[str]) -> Iterator[None]:
    if not device_types:
        yield
        return
    with torch.autocast(device_types[0], enabled=False), _no_autocast(device_types[1:]):
        yield


def _summed_loss(
    model: nn.Module,
    ids: Tensor,
    labels: FisherLabels,
    generators: dict[torch.device, torch.Generator],
    seed: int,
) -> tuple[Tensor, int]:
    """Return the loss summed over positions, in nats, and their number."""
    logits = causal_logits(model, ids)
    if labels is FisherLabels.DATA:
        logits, targets = logits[:, :-1], ids[:, 1:].to(logits.device)
    flat = logits.reshape(-1, logits.shape[-1]).float()
    if not bool(flat.detach().isfinite().all()):
        raise FloatingPointError(f"the model's logits aren't finite: {_overflow_hint(model)}")
    if labels is FisherLabels.SAMPLED:
        if flat.device not in generators:
            generators[flat.device] = torch.Generator(flat.device).manual_seed(seed)
        probabilities = flat.detach().softmax(-1)
        targets = torch.multinomial(probabilities, 1, generator=generators[flat.device])
    return F.cross_entropy(flat, targets.reshape(-1), reduction="sum"), flat.shape[0]


def _squared_gradients(
    loss: Tensor, parameters: Mapping[str, nn.Parameter]
) -> Iterator[tuple[str, Tensor]]:
    """Yield squared gradients, in float32 or better, of the parameters that the loss depends on."""
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    for name, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            dtype = torch.promote_types(gradient.dtype, torch.float32)
            yield name, gradient.to(dtype).square()


def _overflow_hint(model: nn.Module) -> str:
    return f"the weights are corrupt, or {dtype_names(model)} overflows (try float32)"


def _check_batch(ids: Tensor, labels: FisherLabels, model: nn.Module) -> None:
    check_token_ids(ids, model)
    if labels is FisherLabels.DATA and ids.shape[1] < 2:
        raise InputError(
            "data labels need sequences of at least 2 tokens: nothing follows the first"
        )


def _check_measurable(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    refuse_fsdp1(model)
    for name, parameter in parameters.items():
        if isinstance(parameter, DTensor):
            raise InputError(
                f"parameter {name!r} is sharded: save the model and run scripts/collect_fisher.py "
                "on one process"
            )
        if parameter.device.type == "meta":
            raise InputError(f"parameter {name!r} is offloaded (on meta): load the model in memory")
        if not parameter.is_floating_point():
            raise InputError(
                f"parameter {name!r} is quantized ({parameter.dtype}): measure the unquantized "
                "checkpoint"
            )


def _standard_errors(
    draws: list[tuple[int, dict[str, float]]], trace: Mapping[str, float], total: int
) -> dict[str, float] | None:
    """Return standard errors of the ratio mass / tokens (linearised; the draws are independent)."""
    count = len(draws)
    if count < 2:
        return None
    return {
        name: math.sqrt(
            count / (count - 1) * sum((mass[name] - mean * tokens) ** 2 for tokens, mass in draws)
        )
        / total
        for name, mean in trace.items()
    }
