"""What each signal decides of a compressed cache of keys and values, measured on the running model.

Fisher information of *cached numbers* (``lib/signals/kv.py``), per layer, keys and values apart:

    fisher_true         labels sampled from the model, times the codec's squared error
    fisher_again        the same with other labels: what noise alone makes of a decision
    fisher_empirical    the text's labels
    single_batch        the text's labels, one batch
    fisher_trace        that of fisher_true, times 4^-bits instead of the error

The optimizer has no gradient of what is cached. For free there is the moment of the weights that
make it: the gradient of W_k sums x_t g_t' over positions, g_t that of the key at t, so where
positions are taken as independent its trace is that of the keys times |x|^2, and that is what the
norm before it makes of it, sum gamma^2 + beta^2:

    adam                v_hat of the columns that make keys, and values, over |x|^2, times 4^-bits
    adam_error          the same, times the codec's squared error (one forward pass)
    weights_true        as adam, with the true Fisher information of these weights instead of v_hat:
                        what of adam's loss is the detour over the weights, not the moment

Controls: ``error`` (the codec's error alone), ``random``, ``reverse`` (the decision of fisher_true
the wrong way round), and ``oracle``: each side's KL, measured alone on the text for fitting.
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from lib.commands.rank_layers import BATCH, codec_round_trips
from lib.precision.tolerance import spearman
from lib.signals.gradients import FisherLabels
from lib.signals.kv import attention_blocks, collect_kv_fisher
from lib.vocabulary import Precision
from scripts.experiments.kv_cache.compare_kv_cache import (
    BITS,
    Sides,
    allocate_bits,
    keep_full,
    measure_caches,
    shuffles,
    side_costs,
)

if TYPE_CHECKING:
    pass

LOW = Precision.INT2
"""Of the layers that don't stay full."""
MIXED_BITS = 3
LABEL_DRAWS = 2
Costs = list[dict[Precision, float]]
"""Predicted KL by precision: of the keys of layer 0, its values, the keys of layer 1, ..."""
Fields = dict[str, Any]


def compare_caches(
    model: Any,
    diagonals: Mapping[str, Mapping[str, Tensor]],
    *,
    fisher_text: Tensor,
    fit_text: Tensor,
    judge_text: Tensor,
    batch_size: int,
    seed: int,
) -> Fields:
    """Return how the signals rank and decide; ``diagonals``: F of the weights per token, by signal.

    ``rank``: Spearman's correlation with the KL of each layer's keys and values alone at 2 bits, on
    ``fit_text``. The decisions, measured on ``judge_text``: ``keep_one`` and ``keep_half``, which
    layers stay full where the others have 2 bits, and ``mixed``, who gets how many bits at 3 on
    average, all with the same bytes. ``over_true``: KL over that of fisher_true's choice; ``same``:
    share of the kept layers, or of the sides' precisions, that both choices share.
    """
    round_trips = codec_round_trips(tuple(BITS))
    batches = torch.split(fisher_text, BATCH)
    true, again = (
        collect_kv_fisher(model, [*batches] * LABEL_DRAWS, round_trips=round_trips, seed=own)
        for own in (2 * seed, 2 * seed + 1)
    )
    empirical, single = (
        collect_kv_fisher(model, text, round_trips=round_trips, labels=FisherLabels.DATA)
        for text in (batches, [fisher_text[:batch_size]])
    )
    traces = list(chain(*((layer.keys_trace, layer.values_trace) for layer in true)))
    moments, weights = (weight_traces(model, diagonals[s]) for s in ("adam", "fisher_true"))
    errors = codec_errors(model, fisher_text)
    count = 2 * len(true)
    measured = measure_caches(model, fit_text, [_alone(side, count) for side in range(count)])
    oracle = [measured[_alone(side, count)]["kl"] for side in range(count)]
    random = np.random.default_rng(seed).uniform(size=count).tolist()
    costs: dict[str, Costs] = {
        "fisher_true": side_costs(true),
        "fisher_again": side_costs(again),
        "fisher_empirical": side_costs(empirical),
        "single_batch": side_costs(single),
        "fisher_trace": _by_width(traces),
        "adam": _by_width(moments),
        "adam_error": _weigh(errors, moments),
        "weights_true": _by_width(weights),
        "error": _weigh(errors, [1.0] * count),
        "random": _by_width(random),
        "oracle": _by_width(oracle),
    }
    return {
        "layers": len(true),
        "adam_over_trace": float(np.median(np.array(moments) / np.array(traces))),
        "weights_over_trace": float(np.median(np.array(weights) / np.array(traces))),
        "rank": {
            signal: spearman([cost[LOW] for cost in own], oracle)
            for signal, own in costs.items()
            if signal != "oracle"
        },
        **_decide(model, costs, judge_text, seed=seed),
    }


def weight_traces(model: Any, diagonal: Mapping[str, Tensor]) -> list[float]:
    """Return what F of the weights that make them says of the trace of each layer's keys, and
    values, per token.

    For GPT-2, where one matrix (width, 3 width) makes queries, keys and values of a normed input.
    """
    traces = []
    for block in attention_blocks(model):
        norm = model.get_submodule(block.rpartition(".")[0] + ".ln_1")
        squared = float(norm.weight.detach().square().sum() + norm.bias.detach().square().sum())
        _, keys, values = diagonal[f"{block}.c_attn.weight"].double().chunk(3, dim=1)
        traces += [float(keys.sum()) / squared, float(values.sum()) / squared]
    return traces


@torch.inference_mode()
def codec_errors(model: Any, tokens: Tensor) -> list[dict[Precision, float]]:
    """Return the mean squared error of each side's numbers at each precision, of a forward pass."""
    cache: Any = DynamicCache()
    model(input_ids=tokens, past_key_values=cache, use_cache=True)
    sides = [side for layer in cache.layers for side in (layer.keys, layer.values)]
    return [
        {
            Precision(name): float((round_trip(side).double() - side.double()).square().mean())
            for name, round_trip in codec_round_trips(tuple(BITS)).items()
        }
        for side in sides
    ]


def _decide(model: Any, costs: Mapping[str, Costs], text: Tensor, *, seed: int) -> Fields:
    layers = len(costs["fisher_true"]) // 2
    orders = {
        signal: sorted(range(layers), key=lambda i: -(own[2 * i][LOW] + own[2 * i + 1][LOW]))
        for signal, own in costs.items()
    }
    orders["reverse"] = orders["fisher_true"][::-1]
    decisions: dict[str, dict[str, list[Sides]]] = {}
    for name, kept in (("keep_one", 1), ("keep_half", layers // 2)):
        several = {signal: [order] for signal, order in orders.items()}
        several["random"] = shuffles(range(layers), seed)
        decisions[name] = {
            signal: [keep_full(order[:kept], layers, LOW) for order in found]
            for signal, found in several.items()
        }
    mixed = {signal: [allocate_bits(own, MIXED_BITS)] for signal, own in costs.items()
             if signal != "oracle"}  # fmt: skip
    ours = mixed["fisher_true"][0]
    by_damage = sorted(range(len(ours)), key=lambda side: costs["fisher_true"][side][LOW])
    levels = sorted((level for level in ours if level), key=lambda level: -BITS[level])
    reverse = dict(zip(by_damage, levels, strict=True))
    mixed["reverse"] = [tuple(reverse[side] for side in range(len(ours)))]
    mixed["random"] = [
        tuple(ours[side] for side in order) for order in shuffles(range(len(ours)), seed)
    ]
    uniform = next(level for level, bits in BITS.items() if bits == MIXED_BITS)
    mixed["uniform"] = [(uniform,) * len(ours)]
    decisions["mixed"] = mixed
    every = chain(*(chain(*choices.values()) for choices in decisions.values()))
    measured = measure_caches(model, text, list(dict.fromkeys(every)))
    return {
        name: _judge(choices, {sides: measured[sides]["kl"] for sides in measured})
        for name, choices in decisions.items()
    }


def _judge(choices: Mapping[str, Sequence[Sides]], kl: Mapping[Sides, float]) -> Fields:
    reference = choices["fisher_true"][0]
    best = kl[reference]
    result = {}
    for signal, found in choices.items():
        mean = float(np.mean([kl[sides] for sides in found]))
        result[signal] = {
            "kl": mean,
            "over_true": mean / best,
            "same": float(np.mean([_shared(sides, reference) for sides in found])),
        }
    return result


def _shared(sides: Sides, reference: Sides) -> float:
    """Return the share of the full sides that two choices share; of all where none is full."""
    asked = [side for side, level in enumerate(reference) if level is None] or range(len(reference))
    return float(np.mean([sides[side] is reference[side] for side in asked]))


def _alone(side: int, count: int) -> Sides:
    return tuple(LOW if index == side else None for index in range(count))


def _by_width(traces: Sequence[float]) -> Costs:
    return [{level: trace * 4.0**-bits for level, bits in BITS.items()} for trace in traces]


def _weigh(errors: Sequence[Mapping[Precision, float]], weights: Sequence[float]) -> Costs:
    return [
        {level: error * weight for level, error in side.items()}
        for side, weight in zip(errors, weights, strict=True)
    ]
