"""Compare ways to choose the precision of each layer's cached keys and values, at equal bytes.

Measured on held-out text, fed in pieces so that the compressed cache is really read: KL against the
model with a full cache, and perplexity. Fisher information comes from other sequences of that text.

    python scripts/experiments/kv_cache/compare_kv_cache.py \
        --model runs/quickstart/checkpoint [--model DIR ...]

Two questions. *keep_full*: some layers keep full precision, the others have 2 bits: which ones?
*mixed*: bits per layer, keys and values apart, that average 3 or 4: who gets more?
"""

import argparse
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

from lib.commands.cli import emit_json, run_main
from lib.commands.rank_layers import BATCH, codec_round_trips, ranking_document
from lib.errors import InputError
from lib.files import check_writable
from lib.vocabulary import Precision

if TYPE_CHECKING:
    from torch import Tensor

    from lib.signals.kv import KvLayer

Sides = tuple[Precision | None, ...]
"""Precision of keys and values of layer 0, of layer 1, ...; None is full."""

BITS = {
    Precision.INT2: 2,
    Precision.INT3: 3,
    Precision.INT4: 4,
    Precision.INT5: 5,
    Precision.INT6: 6,
    Precision.INT8: 8,
}
BUDGETS = (3, 4)
CHUNK_TOKENS = 32
RANDOM_ORDERS = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, measure every model, print the table and the result."""
    args = _parser().parse_args(argv)
    check_writable(args.json)
    if args.sequences < 4:
        raise InputError(f"--sequences {args.sequences} must be at least 4")
    from lib.checkpoint.models import quiet_transformers

    quiet_transformers(progress=False)
    rows = [compare_model(model, args.sequences, seed=args.seed) for model in args.model]
    if len({len(row["layers"]) for row in rows}) > 1:
        raise InputError("the models have different numbers of layers: compare them one by one")
    document = {
        "models": len(rows),
        **{
            table: {key: _over_models([row[table][key] for row in rows]) for key in rows[0][table]}
            for table in ("keep_full", "mixed", "uniform")
        },
        "prediction": {key: _spread([row["prediction"][key] for row in rows])
                       for key in rows[0]["prediction"]},
        "layers": rows[0]["layers"],
        "method": rows[0]["method"],
        "per_model": rows,
    }  # fmt: skip
    _print_tables(document)
    emit_json(document, args.json)
    return 0


def compare_model(name: str, num_sequences: int, *, seed: int) -> dict[str, Any]:
    """Return what one model's cache loses under every way of choosing."""
    from lib.checkpoint.models import load_model
    from lib.signals.kv import collect_kv_fisher
    from lib.text.held_out import load_heldout, sequence_length

    model: Any = load_model(name)
    text = load_heldout(
        name, vocab_size=model.config.vocab_size, length=sequence_length(model.config, None)
    )
    tokens = text.tokens[:: max(1, len(text.tokens) // num_sequences)][:num_sequences]
    if len(tokens) < 4:
        raise InputError(f"held-out text ({text.source}) has {len(tokens)} sequences, 4 are needed")
    calibration, evaluation = tokens[::2], tokens[1::2]
    layers = collect_kv_fisher(
        model, calibration.split(BATCH), round_trips=codec_round_trips(tuple(BITS)), seed=seed
    )
    keep = keep_full_choices(layers, seed=seed)
    mixed = mixed_choices(layers, seed=seed)
    uniform: dict[str, Sides] = {str(p): (p,) * (2 * len(layers)) for p in BITS}
    singles = {
        (side, precision): _single(side, precision, 2 * len(layers))
        for side in range(2 * len(layers))
        for precision in (Precision.INT2, Precision.INT4)
    }
    wanted = [*uniform.values(), *singles.values()]
    wanted += [choice for arms in (*keep.values(), *mixed.values()) for choices in arms.values()
               for choice in choices]  # fmt: skip
    measured = measure_caches(model, evaluation, list(dict.fromkeys(wanted)))
    return {
        "model": name,
        "keep_full": {
            key: {arm: _mean_of(measured, choices) for arm, choices in arms.items()}
            for key, arms in keep.items()
        },
        "mixed": {
            key: {arm: _mean_of(measured, choices) for arm, choices in arms.items()}
            for key, arms in mixed.items()
        },
        "uniform": {key: {"uniform": measured[sides]} for key, sides in uniform.items()},
        "prediction": _judge_prediction(layers, singles, measured),
        **ranking_document(layers),
        "method": {
            "text": text.source,
            "calibration_tokens": calibration.numel(),
            "evaluation_tokens": evaluation.numel(),
            "piece_tokens": CHUNK_TOKENS,
            "scales": "one scale and zero per head and token",
            "random_orders": RANDOM_ORDERS,
        },
    }


def keep_full_choices(
    layers: "Sequence[KvLayer]", *, seed: int
) -> dict[str, dict[str, list[Sides]]]:
    """Return how many layers stay full -> arm -> choices (several where they are drawn)."""
    low = Precision.INT2
    numbers = list(range(len(layers)))
    damage = sorted(numbers, key=lambda i: -layers[i].damage[str(low)].total)
    orders = {
        "ours": [damage],
        "trace": [sorted(numbers, key=lambda i: -layers[i].trace)],
        "reverse": [damage[::-1]],
        "random": shuffles(numbers, seed),
        "first": [numbers],
        "last": [numbers[::-1]],
    }
    counts = sorted({max(1, len(layers) * share // 6) for share in (2, 3, 4)})
    return {
        str(count): {
            arm: [keep_full(order[:count], len(layers), low) for order in several]
            for arm, several in orders.items()
        }
        for count in counts
    }


def mixed_choices(layers: "Sequence[KvLayer]", *, seed: int) -> dict[str, dict[str, list[Sides]]]:
    """Return average bits -> arm -> choices; all arms of a budget have the same bytes."""
    costs = side_costs(layers)
    choices: dict[str, dict[str, list[Sides]]] = {}
    for budget in BUDGETS:
        ours = allocate_bits(costs, budget)
        by_damage = sorted(range(len(ours)), key=lambda side: costs[side][Precision.INT2])
        levels = sorted((level for level in ours if level), key=lambda level: -BITS[level])
        reverse = dict(zip(by_damage, levels, strict=True))
        shuffled = shuffles(list(range(len(ours))), seed)
        uniform = next(level for level, bits in BITS.items() if bits == budget)
        choices[str(budget)] = {
            "ours": [ours],
            "uniform": [(uniform,) * len(ours)],
            "reverse": [tuple(reverse[side] for side in range(len(ours)))],
            "random": [tuple(ours[side] for side in order) for order in shuffled],
        }
    return choices


def side_costs(layers: "Sequence[KvLayer]") -> list[dict[Precision, float]]:
    """Return predicted KL per precision of keys and values of layer 0, of layer 1, ..."""
    return [
        {level: getattr(layer.damage[str(level)], side) for level in BITS}
        for layer in layers
        for side in ("keys", "values")
    ]


def allocate_bits(costs: Sequence[Mapping[Precision, float]], mean_bits: int) -> Sides:
    """Choose a precision per side with the least predicted KL at exactly ``mean_bits``.

    All sides have the same size, so the bits are small integers and dynamic programming is exact.
    """
    best: dict[int, tuple[float, tuple[Precision, ...]]] = {0: (0.0, ())}
    for cost in costs:
        reached: dict[int, tuple[float, tuple[Precision, ...]]] = {}
        for spent, (kl, chosen) in best.items():
            for level, bits in BITS.items():
                candidate = (kl + cost[level], (*chosen, level))
                if spent + bits not in reached or candidate[0] < reached[spent + bits][0]:
                    reached[spent + bits] = candidate
        best = reached
    return best[mean_bits * len(costs)][1]


def measure_caches(
    model: Any, tokens: "Tensor", choices: Sequence[Sides]
) -> dict[Sides, dict[str, float]]:
    """Return KL against the full cache (nats per token), perplexity and bytes per token of each."""
    import torch
    import torch.nn.functional as F
    from tqdm import tqdm

    from lib.progressive.kv_cache import cache_bytes

    sums = {sides: np.zeros(3) for sides in choices}
    with torch.inference_mode(), tqdm(total=len(choices) * len(tokens), unit="sequence",
                                      disable=not sys.stderr.isatty()) as bar:  # fmt: skip
        for ids in tokens.split(BATCH):
            full, _ = feed_pieces(model, ids, (None,) * len(choices[0]))
            reference = full.log_softmax(-1)
            for sides in choices:
                logits, cache = feed_pieces(model, ids, sides)
                kl = F.kl_div(logits.log_softmax(-1), reference, log_target=True, reduction="sum")
                loss = F.cross_entropy(
                    logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
                )
                sums[sides] += [float(kl), float(loss), cache_bytes(cache)]
                bar.update(len(ids))
    predicted = len(tokens) * (tokens.shape[1] - 1)
    return {
        sides: {
            "kl": float(kl) / tokens.numel(),
            "ppl": float(np.exp(loss / predicted)),
            "bytes_per_token": float(size) / tokens.numel(),
        }
        for sides, (kl, loss, size) in sums.items()
    }


def feed_pieces(model: Any, ids: "Tensor", sides: Sides) -> "tuple[Tensor, Any]":
    """Return logits (B, T, V) of sequences that are read a piece at a time, and the cache."""
    import torch

    from lib.codecs.records import Codec
    from lib.progressive.kv_cache import make_cache

    codecs = [None if level is None else Codec(level) for level in sides]
    cache = make_cache(list(zip(codecs[::2], codecs[1::2], strict=True)))
    pieces = [
        model(input_ids=piece, past_key_values=cache, use_cache=True).logits.double()
        for piece in ids.split(CHUNK_TOKENS, dim=1)
    ]
    return torch.cat(pieces, dim=1), cache


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the rank correlation of two lists without ties."""
    ranks = [np.argsort(np.argsort(np.array(values))) for values in (first, second)]
    count = len(first)
    return 1 - 6 * float(((ranks[0] - ranks[1]) ** 2).sum()) / (count * (count**2 - 1))


def _judge_prediction(
    layers: "Sequence[KvLayer]",
    singles: Mapping[tuple[int, Precision], Sides],
    measured: Mapping[Sides, Mapping[str, float]],
) -> dict[str, float]:
    """Compare predicted and measured KL, each layer's keys or values alone."""
    costs = side_costs(layers)
    traces = [t for layer in layers for t in (layer.keys_trace, layer.values_trace)]
    result = {}
    for level in (Precision.INT2, Precision.INT4):
        keys = [key for key in singles if key[1] is level]
        truth = [measured[singles[key]]["kl"] for key in keys]
        predicted = [costs[side][level] for side, _ in keys]
        result[f"spearman_{level}"] = spearman(predicted, truth)
        result[f"spearman_trace_only_{level}"] = spearman([traces[side] for side, _ in keys], truth)
        ratios = np.array(predicted) / np.maximum(truth, 1e-12)
        result[f"predicted_over_measured_{level}"] = float(np.median(ratios))
    return result


def _single(side: int, level: Precision, count: int) -> Sides:
    return tuple(level if index == side else None for index in range(count))


def keep_full(full: Sequence[int], count: int, low: Precision) -> Sides:
    """Return a cache of ``count`` layers of which some stay full and the others don't."""
    return tuple(None if index // 2 in full else low for index in range(2 * count))


def shuffles(numbers: Sequence[int], seed: int) -> list[list[int]]:
    """Return random orders of some numbers."""
    generator = random.Random(seed)
    return [generator.sample(list(numbers), len(numbers)) for _ in range(RANDOM_ORDERS)]


def _mean_of(
    measured: Mapping[Sides, Mapping[str, float]], choices: Sequence[Sides]
) -> dict[str, float]:
    return {
        name: mean(measured[sides][name] for sides in choices)
        for name in ("kl", "ppl", "bytes_per_token")
    }


def _over_models(rows: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """Return quantity -> arm -> mean and sd over models."""
    return {
        name: {arm: _spread([row[arm][name] for row in rows]) for arm in rows[0]}
        for name in ("kl", "ppl", "bytes_per_token")
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": mean(values), "sd": stdev(values) if len(values) > 1 else 0.0}


def _print_tables(document: Mapping[str, Any]) -> None:
    titles = {
        "keep_full": "layers at full precision, the others at 2 bits",
        "mixed": "bits on average, keys and values of each layer apart",
        "uniform": "all layers alike",
    }
    for table, title in titles.items():
        print(f"{title}: KL in nats per token, mean over {document['models']} models")
        for key, row in document[table].items():
            cells = (f"{arm} {value['mean']:.3g}" for arm, value in row["kl"].items())
            size = next(iter(row["bytes_per_token"].values()))["mean"]
            print(f"  {key:<6}{size:>7.1f} B/token  " + "  ".join(cells))
        print()
    for name, value in document["prediction"].items():
        print(f"{name:<32}{value['mean']:.3f}")
    print()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="compare_kv_cache.py", description=__doc__.split("\n\n")[0].strip()
    )
    default = "(default: %(default)s)"
    parser.add_argument(
        "--model", required=True, action="append", metavar="DIR", help="checkpoint; may be repeated"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help=f"of sampled labels and random orders {default}"
    )
    parser.add_argument(
        "--sequences",
        type=int,
        default=128,
        metavar="N",
        help=f"of held-out text, at most; every other one is measured on {default}",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
