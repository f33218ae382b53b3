"""Pruning: which weights of the attention and MLP matrices become zero, and when.

A weight set to zero is an error delta = -w, so the equation that predicts quantization damage,
KL ~ 1/2 sum F_ii delta_i^2, gives a score: w^2 F ("saliency"; LeCun et al. 1990, "Optimal Brain
Damage"). F is Adam's bias-corrected second moment v_hat here, up to a constant that changes no
ranking. Its fourth root instead of its square root, |w| (v_hat + eps)^(1/4), trusts the moment less
and the magnitude more; it lies half-way between saliency's |w| v_hat^(1/2) and magnitude's |w|.

Sparsity rises along the cubic of Zhu & Gupta 2017 (arXiv 1710.01878). Nothing here keeps state: the
caller holds the masks, multiplies weights with them, and passes them back.
"""

from collections.abc import Mapping
from enum import StrEnum

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..blocks import BlockKind, partition_model, unique_parameters, whole_tensor
from ..errors import InputError
from ..signals.optimizers import moment_beta2, moment_step, second_moment, unwrap_optimizer

EPSILON = 1e-12
"""Added to v_hat, which is about 1e-8 where a batch has a thousand tokens: it matters only where no
gradient ever came.
"""
_KINDS = (BlockKind.ATTENTION, BlockKind.MLP, BlockKind.EXPERT)


class PruneScore(StrEnum):
    """What says how much a weight is worth keeping."""

    ADAM = "adam"  # |w| (v_hat + eps)^(1/4)
    SALIENCY = "saliency"  # |w| (v_hat + eps)^(1/2)
    MAGNITUDE = "magnitude"  # |w|
    RANDOM = "random"


class PruneScope(StrEnum):
    """Among which weights the lowest scores are looked for."""

    MATRIX = "matrix"  # in each matrix by itself: all become equally sparse
    GLOBAL = "global"  # in all matrices together


def prunable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the matrices of attention, MLP and experts by name: no embeddings, norms, biases.

    Raises InputError for a model without any.
    """
    parameters = unique_parameters(model)
    pieces = (piece for b in partition_model(model) if b.kind in _KINDS for piece in b.pieces)
    names = dict.fromkeys(piece.parameter for piece in pieces)
    found = {name: parameters[name] for name in names if parameters[name].dim() >= 2}
    if not found:
        raise InputError(f"{type(model).__name__} has no attention or MLP matrices to prune")
    return found


@torch.no_grad()
def score_weights(
    parameters: Mapping[str, nn.Parameter],
    score: PruneScore,
    *,
    optimizer: Optimizer | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Return a score for each weight, non-negative, float32, whole even where parameters are
    sharded (then collective).

    ``optimizer`` has the moments, for the scores that need them; ``seed`` is of random scores.
    Raises InputError for moments that are missing or of another kind than Adam's.
    """
    scores: dict[str, Tensor] = {}
    for index, (name, parameter) in enumerate(parameters.items()):
        if score is PruneScore.RANDOM:
            state = np.random.SeedSequence([seed, index]).generate_state(1)[0]
            values = torch.rand(
                parameter.shape, generator=torch.Generator().manual_seed(int(state))
            )
            scores[name] = values.to(parameter.device)
            continue
        magnitude = whole_tensor(parameter.detach()).abs().float()
        if score is not PruneScore.MAGNITUDE:
            assert optimizer is not None, f"{score} needs the optimizer"
            moment = corrected_moment(optimizer, name, parameter).add_(EPSILON)
            magnitude *= moment.pow_(0.25 if score is PruneScore.ADAM else 0.5)
        if not bool(magnitude.isfinite().all()):
            raise InputError(f"{name!r} or its second moment isn't finite: training diverged")
        scores[name] = magnitude
    return scores


def corrected_moment(optimizer: Optimizer, name: str, parameter: nn.Parameter) -> Tensor:
    """Return a new float32 tensor with a parameter's v_hat = exp_avg_sq / (1 - beta2^step)."""
    optimizer = unwrap_optimizer(optimizer)
    groups = (g for g in optimizer.param_groups for p in g["params"] if p is parameter)
    group = next(groups, None)
    state = optimizer.state.get(parameter, {})
    if group is None or not state:
        raise InputError(f"{name!r} has no moment in the optimizer: take a step first")
    step = moment_step(optimizer, name, state, group)
    correction = 1 - moment_beta2(optimizer, group) ** step
    return second_moment(optimizer, name, parameter, state).float() / correction


def select_masks(
    scores: Mapping[str, Tensor],
    sparsity: float,
    *,
    scope: PruneScope,
    masks: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return boolean masks, True where a weight is kept, with round(sparsity * n) weights pruned.

    ``masks``: what is pruned already and stays so, which may exceed the share asked for.
    """
    if not 0 <= sparsity < 1:
        raise InputError(f"sparsity {sparsity} is out of range: give a share in [0, 1)")
    if masks is not None:  # scores are not negative, so what is pruned comes first
        scores = {name: s.masked_fill(~masks[name], -1.0) for name, s in scores.items()}
    if scope is PruneScope.MATRIX:
        return {name: _keep_highest(s, sparsity) for name, s in scores.items()}
    flat = _keep_highest(torch.cat([s.flatten() for s in scores.values()]), sparsity)
    parts = torch.split(flat, [s.numel() for s in scores.values()])
    return {n: part.view(s.shape) for (n, s), part in zip(scores.items(), parts, strict=True)}


def cubic_sparsity(step: int, *, final: float, start: int, end: int) -> float:
    """Return the sparsity after a step: 0 until ``start``, ``final`` from ``end`` on.

    s(t) = s_f - s_f (1 - (t - t_0) / (t_1 - t_0))^3: fast while much is redundant, then slow.
    """
    progress = min(1.0, max(0.0, (step - start) / (end - start)))
    return final * (1 - (1 - progress) ** 3)


def measured_sparsity(masks: Mapping[str, Tensor]) -> float:
    """Return the share of pruned weights."""
    total = sum(mask.numel() for mask in masks.values())
    return 1 - sum(int(mask.sum()) for mask in masks.values()) / total


def _keep_highest(scores: Tensor, sparsity: float) -> Tensor:
    """Return the mask of all but the lowest scores; equal ones are cut anywhere between them."""
    flat = scores.flatten()
    pruned = max(round(sparsity * flat.numel()), int((flat < 0).sum()))
    keep = torch.ones_like(flat, dtype=torch.bool)
    keep[torch.topk(flat, pruned, largest=False, sorted=False).indices] = False
    return keep.view(scores.shape)
