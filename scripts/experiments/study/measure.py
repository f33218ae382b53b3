"""What the study measures at one checkpoint: four signals and three controls against each other and
against the measured KL.

The held-out sequences are cut in three: Fisher information is estimated on the first half; the KL
of single blocks, and the scales made of it, come from the next quarter; what is decided is judged
on the last. Signals, all as F per token and put into 1/2 sum F delta^2:

    adam               v_hat * tokens_per_update / mean_clip_sq, as the optimizer left it
    single_batch       the squared gradient of one batch as large as those of the training
    fisher_empirical   squared gradients of sequences with the text's labels
    fisher_true        squared gradients with labels sampled from the model

Controls: ``magnitude`` (1/2 sum delta^2), ``adam_trace`` (sum of v_hat times 4^-bits: importance
without the codec's error) and ``random``. The true Fisher is estimated in two independent halves;
how well they agree is the ceiling of what anything can reach against it.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from gpt2.checkpoint import HELDOUT_FILE, load_state
from gpt2.model import load_model
from lib.blocks import partition_model
from lib.codecs.storage import weight_form
from lib.precision.sensitivity import (
    Curves,
    diagonal_curves,
    magnitude_curves,
    random_curves,
)
from lib.precision.sizes import StoredSizes, stored_sizes
from lib.precision.tolerance import spearman
from lib.signals import MomentScale, measure_fisher
from lib.signals.gradients import FisherLabels, GradientSampler
from lib.signals.moments import read_moments
from lib.vocabulary import Precision
from scripts.experiments.study.caches import compare_caches
from scripts.experiments.study.decisions import (
    PRECISIONS,
    Meter,
    compare_allocations,
    compare_floors,
)

FISHER = ("adam", "single_batch", "fisher_empirical", "fisher_true")
CONTROLS = ("magnitude", "adam_trace", "random")
LABEL_DRAWS = 2
"""Times that labels are sampled for each sequence, in each half of the true Fisher."""
_TOP_ELEMENTS = 0.01
_TOP_BLOCKS = 1 / 3
_POOLED = 200_000
Diagonal = Mapping[str, Tensor]
Fields = dict[str, Any]


def measure_checkpoint(folder: Path, *, beta2: float, batch_size: int, seed: int) -> Fields:
    """Return everything the study wants to know of a checkpoint, ready for JSON.

    ``beta2`` and ``batch_size`` (sequences) are those of the training.
    """
    model = load_model(folder, dropout=0.0).eval()
    state = load_state(folder)
    assert state is not None
    tokens = load_file(folder / HELDOUT_FILE)["tokens"]
    first, second = len(tokens) // 2, len(tokens) * 3 // 4
    fisher_text, fit_text, judge_text = tokens[:first], tokens[first:second], tokens[second:]
    sizes = stored_sizes(model, PRECISIONS)
    matrices = [
        piece.parameter
        for block in partition_model(model)
        for piece in block.pieces
        if weight_form(model, piece.parameter, PRECISIONS[-1])
    ]
    values = MomentScale.from_state_dict(state.scale).values(state.step)
    assert values is not None, "the trainer saw every step"
    tokens_per_update, mean_clip_sq = values
    halves = [
        true_fisher(model, part, seed=2 * seed + index)
        for index, part in enumerate(torch.chunk(fisher_text, 2))
    ]
    data = measure_fisher(model, [fisher_text], labels="data", keep_diagonal=True).diagonal
    assert data is not None
    diagonals: dict[str, Diagonal] = {
        "adam": {
            name: moment * tokens_per_update / mean_clip_sq
            for name, moment in read_moments(folder, beta2=beta2)
        },
        "single_batch": single_batch(model, fisher_text[:batch_size]),
        "fisher_empirical": data,
        "fisher_true": {name: (halves[0][name] + halves[1][name]) / 2 for name in halves[0]},
    }
    curves: dict[str, Curves] = {
        signal: diagonal_curves(model, diagonal.items(), precisions=PRECISIONS)
        for signal, diagonal in diagonals.items()
    }
    curves["magnitude"] = magnitude_curves(model, precisions=PRECISIONS)
    curves["adam_trace"] = _trace_curves(model, diagonals["adam"])
    curves["random"] = random_curves(model, seed=seed, precisions=PRECISIONS)
    oracle = Meter(model, fit_text).oracle(sizes)
    judge = Meter(model, judge_text)
    return {
        "step": state.step,
        "heldout_loss_nats": state.heldout_loss,
        "tokens_per_update": tokens_per_update,
        "mean_clip_sq": mean_clip_sq,
        "num_weights": sizes.num_weights,
        "num_blocks": len(sizes.num_params),
        "elements": compare_elements(diagonals, halves, matrices),
        "traces": compare_traces(model, diagonals),
        "blocks": compare_blocks(curves, oracle, sizes),
        "allocation": compare_allocations({**curves, "oracle": oracle}, sizes, judge, seed=seed),
        "floors": compare_floors(
            {**{signal: curves[signal] for signal in FISHER}, "oracle": oracle}, sizes, judge
        ),
        "caches": compare_caches(
            model,
            diagonals,
            fisher_text=fisher_text,
            fit_text=fit_text,
            judge_text=judge_text,
            batch_size=batch_size,
            seed=seed,
        ),
    }


def true_fisher(model: Any, tokens: Tensor, *, seed: int) -> Diagonal:
    """Return the true Fisher diagonal on sequences (N, T), each with labels sampled anew."""
    batches = torch.split(tokens.repeat(LABEL_DRAWS, 1), 1)
    diagonal = measure_fisher(model, batches, keep_diagonal=True, seed=seed).diagonal
    assert diagonal is not None
    return diagonal


def single_batch(model: Any, tokens: Tensor) -> Diagonal:
    """Return the squared gradient of sequences (B, T) together, with the text's labels: what Adam's
    moment would be if it forgot all other batches.
    """
    with GradientSampler(model, labels=FisherLabels.DATA) as sampler:
        draws = list(sampler.draws(tokens))
    num_tokens = sum(draw.tokens for draw in draws)
    return {
        name: torch.stack([draw.gradients[name] for draw in draws]).sum(0).square() / num_tokens
        for name in draws[0].gradients
    }


def compare_elements(
    diagonals: Mapping[str, Diagonal], halves: Sequence[Diagonal], matrices: Sequence[str]
) -> Fields:
    """Compare diagonals weight by weight, over the matrices.

    ``within``: median over the parameters of Spearman's correlation inside each; ``pooled``: over a
    random sample of all weights; ``top``: share of the largest 1 % that both have in common, where
    chance gives 1 %.
    """

    def compare(first: Diagonal, second: Diagonal) -> Fields:
        pairs = [
            (first[name].flatten().numpy(), second[name].flatten().numpy()) for name in matrices
        ]
        one, two = (np.concatenate(side) for side in zip(*pairs, strict=True))
        sample = np.random.default_rng(0).choice(len(one), min(_POOLED, len(one)), replace=False)
        return {
            "within": float(np.median([_rank_correlation(a, b) for a, b in pairs])),
            "pooled": _rank_correlation(one[sample], two[sample]),
            "top": top_overlap(one, two, share=_TOP_ELEMENTS),
        }

    return {
        "adam~fisher_true": compare(diagonals["adam"], diagonals["fisher_true"]),
        "adam~fisher_empirical": compare(diagonals["adam"], diagonals["fisher_empirical"]),
        "single_batch~fisher_true": compare(diagonals["single_batch"], diagonals["fisher_true"]),
        "fisher_empirical~fisher_true": compare(
            diagonals["fisher_empirical"], diagonals["fisher_true"]
        ),
        "fisher_true~fisher_true": compare(*halves),
    }


def compare_traces(model: Any, diagonals: Mapping[str, Diagonal]) -> Fields:
    """Compare the blocks' Fisher traces: Spearman's correlation, and the share of the largest third
    that both have in common.
    """
    traces = {
        signal: [
            sum(float(diagonal[piece.parameter].double().sum()) for piece in block.pieces)
            for block in partition_model(model)
        ]
        for signal, diagonal in diagonals.items()
    }
    pairs = [(signal, "fisher_true") for signal in FISHER[:-1]] + [("adam", "fisher_empirical")]
    return {
        f"{one}~{two}": {
            "rho": spearman(traces[one], traces[two]),
            "top": top_overlap(np.array(traces[one]), np.array(traces[two]), share=_TOP_BLOCKS),
        }
        for one, two in pairs
    }


def compare_blocks(curves: Mapping[str, Curves], oracle: Curves, sizes: StoredSizes) -> Fields:
    """Compare predicted with measured KL of every block and precision.

    ``overall``: Spearman over all pairs; ``within``: its mean over the precisions, over the blocks
    at each; ``top``: share of the third of the blocks that suffer most which both have in common,
    mean over the precisions; ``measured_over_predicted``: median, of signals in nats;
    ``log_sd``: of that ratio.
    """
    names = list(sizes.num_params)
    pairs = [(name, precision) for precision in PRECISIONS for name in names]
    measured = np.array([oracle[name][precision] for name, precision in pairs])
    result: Fields = {}
    for signal, own in curves.items():
        predicted = np.array([own[name][precision] for name, precision in pairs])
        by_width = list(
            zip(
                np.split(predicted, len(PRECISIONS)),
                np.split(measured, len(PRECISIONS)),
                strict=True,
            )
        )
        result[signal] = {
            "overall": spearman(predicted.tolist(), measured.tolist()),
            "within": float(np.mean([spearman(p.tolist(), m.tolist()) for p, m in by_width])),
            "top": float(np.mean([top_overlap(p, m, share=_TOP_BLOCKS) for p, m in by_width])),
        }
        if signal in FISHER:
            ratios = measured / predicted
            result[signal]["measured_over_predicted"] = float(np.median(ratios))
            result[signal]["log_sd"] = float(np.log(ratios).std())
    return result


def top_overlap(first: NDArray[Any], second: NDArray[Any], *, share: float) -> float:
    """Return which part of the largest ``share`` of one side is among the other's."""
    count = max(1, math.ceil(share * len(first)))
    tops = [set(np.argpartition(-side, count - 1)[:count].tolist()) for side in (first, second)]
    return len(tops[0] & tops[1]) / count


def _trace_curves(model: Any, diagonal: Diagonal) -> Curves:
    bits = {Precision.INT8: 8, Precision.INT6: 6, Precision.INT5: 5}
    bits |= {Precision.INT4: 4, Precision.INT3: 3, Precision.INT2: 2}
    return {
        block.name: {
            p: sum(float(diagonal[piece.parameter].double().sum()) for piece in block.pieces)
            * 4.0 ** -bits[p]
            for p in PRECISIONS
        }
        for block in partition_model(model)
    }


def _rank_correlation(first: NDArray[Any], second: NDArray[Any]) -> float:
    """Return Spearman's correlation of many values."""
    one, two = (np.argsort(np.argsort(side, kind="stable")) for side in (first, second))
    return float(np.corrcoef(one, two)[0, 1])
