"""Predicted damage of every block at every precision: KL(full || stored) in nats per token.

To second order the output distribution moves by KL = 1/2 delta' F delta, F the Fisher information
per token (Kunstner et al. 2019, arXiv 1905.12558) and delta the codec's actual error. Estimates:

- *diagonal*: 1/2 sum_i F_ii delta_i^2, with F from Adam's moment (``diagonal_curves``), or from
  sampled or the text's labels (``gradient_curves``). It takes errors of different weights for
  independent, as those of rounding nearly are.
- *directional*: 1/2 E[(g . delta)^2] over gradients g of single draws, unbiased for 1/2 delta' F
  delta inside a block whatever the codec, with relative standard error sqrt(2 / draws).

Errors between blocks are taken for independent; a joint measurement (``quality``) checks that.
The *controls* are what a signal must beat: the squared error alone, and chance.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter

import numpy as np
import torch
from torch import Tensor, nn

from ..blocks import Block, partition_model, unique_parameters
from ..errors import InputError
from ..signals.gradients import FisherLabels, GradientSampler
from ..signals.summary import block_masses, packed_parameters, ratio_stderr, sum_elements
from ..vocabulary import Precision
from .errors import WeightErrors
from .perturb import curve_precisions
from .remember import Remember, call

Curves = Mapping[str, Mapping[Precision, float]]
"""Block -> precision, most precise first -> a number, mostly KL in nats per token."""

_Draw = tuple[int, list[list[float]], list[list[float]]]
"""Tokens, then both estimates per block and precision, times the tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientCurves:
    """Both estimates from the same backward passes, with standard errors over the draws."""

    diagonal: Curves
    directional: Curves
    diagonal_stderr: Curves
    directional_stderr: Curves
    labels: FisherLabels
    tokens: int
    draws: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """A step of a curve at which fewer bits seem to cost less, and why."""

    block: str
    finer: Precision
    coarser: Precision
    reason: str


def gradient_curves(
    model: nn.Module,
    batches: Iterable[Tensor],
    *,
    labels: FisherLabels | str = FisherLabels.SAMPLED,
    precisions: Sequence[Precision] | None = None,
    seed: int = 0,
    errors: WeightErrors | None = None,
    remember: Remember = call,
    progress: Callable[[int], object] | None = None,
) -> GradientCurves:
    """Estimate both from backward passes on text: the true Fisher with sampled labels, the
    empirical one with data labels.

    ``batches``: token ids (B, T); with sampled labels each batch is one draw, so give single
    sequences where the directional estimate matters. ``precisions``: those below the model's own if
    None. One gradient of the model is held, and ``errors`` as far as they are kept. ``remember``
    keeps what each batch gave, so that an interrupted estimate goes on. ``progress`` is called with
    the number of sequences done. Raises as ``GradientSampler`` and its draws do.
    """
    sampler = GradientSampler(model, labels=labels, seed=seed)
    blocks = partition_model(model)
    errors = errors or WeightErrors(sampler.model)
    asked = tuple(precisions or curve_precisions(model))
    draws: list[_Draw] = []
    with sampler:
        for index, batch in enumerate(batches):
            products = partial(_batch_products, sampler, batch, blocks, errors, asked)
            # Labels depend on a draw's number, whether or not those before it are computed anew.
            sampler.number = len(draws)
            draws += remember(f"{sampler.labels} gradients {index}", products)
            if progress is not None:
                progress(len(batch))
    if not draws:
        raise InputError("no text to measure Fisher information on: give at least one batch")
    tokens = [number for number, _, _ in draws]

    def make_curves(
        rows_of: Callable[[_Draw], list[list[float]]], reduce: Callable[[list[float]], float]
    ) -> Curves:
        return {
            block.name: {
                precision: reduce([rows_of(draw)[row][column] for draw in draws])
                for column, precision in enumerate(asked)
            }
            for row, block in enumerate(blocks)
        }

    def mean(values: list[float]) -> float:
        return sum(values) / sum(tokens)

    def stderr(values: list[float]) -> float:
        return ratio_stderr(values, tokens)

    return GradientCurves(
        diagonal=make_curves(itemgetter(2), mean),
        directional=make_curves(itemgetter(1), mean),
        diagonal_stderr=make_curves(itemgetter(2), stderr),
        directional_stderr=make_curves(itemgetter(1), stderr),
        labels=sampler.labels,
        tokens=sum(tokens),
        draws=len(draws),
    )


def _batch_products(
    sampler: GradientSampler,
    batch: Tensor,
    blocks: Sequence[Block],
    errors: WeightErrors,
    precisions: Sequence[Precision],
) -> list[_Draw]:
    """Return what each draw of a batch gives."""
    packed = packed_parameters(blocks)
    found = []
    for draw in sampler.draws(batch):
        sums: dict[Precision, tuple[dict[str, Tensor], dict[str, Tensor]]] = {
            precision: ({}, {}) for precision in precisions
        }
        for name, gradient in draw.gradients.items():
            products = errors.products(name, gradient, precisions, per_expert=name in packed)
            for precision, (product, square) in products.items():
                sums[precision][0][name], sums[precision][1][name] = product, square
        directional = [block_masses(blocks, products) for products, _ in sums.values()]
        diagonal = [block_masses(blocks, squares) for _, squares in sums.values()]
        found.append(
            (
                draw.tokens,
                [[0.5 * masses[block.name] ** 2 for masses in directional] for block in blocks],
                [[0.5 * masses[block.name] for masses in diagonal] for block in blocks],
            )
        )
    return found


def diagonal_curves(
    model: nn.Module,
    diagonals: Iterable[tuple[str, Tensor]],
    *,
    scale: float = 1.0,
    precisions: Sequence[Precision] | None = None,
    errors: WeightErrors | None = None,
) -> Curves:
    """Return 1/2 sum_i scale * d_i * delta_i^2 of every block whose weights all have a diagonal.

    ``diagonals``: parameter name -> d of its shape, in any order, read one at a time: a stored
    Fisher diagonal, or Adam's v_hat with scale tokens_per_update / mean_clip_sq
    (``signals.scale``). Weights that a precision keeps raw need no diagonal. ``errors`` of the
    model, where some are known already.
    """
    errors = errors or WeightErrors(model, keep_bytes=0)
    precisions = tuple(precisions or curve_precisions(model))
    blocks = partition_model(model)
    parameters = unique_parameters(model)
    packed = packed_parameters(blocks)
    sums: dict[Precision, dict[str, Tensor]] = {precision: {} for precision in precisions}
    for name, diagonal in diagonals:
        if name not in parameters or diagonal.shape != parameters[name].shape:
            raise InputError(
                f"the diagonal of {name!r} {tuple(diagonal.shape)} fits no weight of the model: it "
                "is another model's"
            )
        for precision in precisions:
            squares = errors.squares(name, precision).mul_(diagonal.to(parameters[name].device))
            sums[precision][name] = sum_elements(squares, per_expert=name in packed) * 0.5 * scale
    known = [block for block in blocks if _has_all(block, sums[precisions[0]], parameters)]
    masses = {precision: block_masses(known, sums[precision]) for precision in precisions}
    return {
        block.name: {precision: masses[precision][block.name] for precision in precisions}
        for block in known
    }


def magnitude_curves(
    model: nn.Module,
    *,
    precisions: Sequence[Precision] | None = None,
    errors: WeightErrors | None = None,
) -> Curves:
    """Control: 1/2 sum_i delta_i^2, every weight alike. Not in nats."""
    diagonals = (
        (name, torch.ones((), device=p.device).expand(p.shape))
        for name, p in unique_parameters(model).items()
    )
    return diagonal_curves(model, diagonals, precisions=precisions, errors=errors)


def random_curves(
    model: nn.Module, *, seed: int = 0, precisions: Sequence[Precision] | None = None
) -> Curves:
    """Control: uniform random numbers."""
    random = np.random.default_rng(seed)
    return {
        block.name: {p: float(random.random()) for p in precisions or curve_precisions(model)}
        for block in partition_model(model)
    }


def monotone(curve: Mapping[Precision, float]) -> dict[Precision, float]:
    """Return the least curve above this one on which fewer bits never cost less.

    What the veto needs: a precision is never taken for safer than one that keeps more bits.
    """
    largest = 0.0
    result = {}
    for precision, value in curve.items():
        largest = max(largest, value)
        result[precision] = largest
    return result


def find_violations(
    curves: Curves, *, errors: Curves, stderr: Curves | None = None
) -> list[Violation]:
    """Return the steps at which fewer bits are predicted to cost less, each with its reason.

    ``errors``: the magnitude curves; ``stderr``: of the prediction, where it has one.
    """
    found = []
    for block, curve in curves.items():
        steps = list(curve)
        for finer, coarser in zip(steps, steps[1:], strict=False):
            drop = curve[finer] - curve[coarser]
            if drop <= 0:
                continue
            noise = 0.0
            if stderr is not None:
                noise = 2 * float(np.hypot(stderr[block][finer], stderr[block][coarser]))
            if drop <= noise:
                reason = f"within the estimate's own error (2 standard errors: {noise:.3g} nats)"
            elif errors[block][coarser] < errors[block][finer]:
                reason = (
                    f"the error itself is smaller: {finer} and {coarser} cut rows into groups of "
                    "other sizes"
                )
            else:
                reason = f"the weights that matter most happen to round better at {coarser}"
            found.append(Violation(block=block, finer=finer, coarser=coarser, reason=reason))
    return found


def _has_all(
    block: Block, sums: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]
) -> bool:
    return all(
        piece.parameter in sums or parameters[piece.parameter].dim() < 2 for piece in block.pieces
    )
