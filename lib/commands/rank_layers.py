"""Rank a model's layers by the Fisher trace of their keys and values, for choosing which ones get a
cheaper attention or a compressed cache.

    tierhints rank-layers --model runs/quickstart/checkpoint --output layers.json

The file lists the layers, least sensitive first, with what compressing each one's cache to 8, 4 and
2 bits is predicted to cost; "cheapest_first" is the list of their numbers alone.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import write_json
from ..vocabulary import Precision
from .cli import Parser, add_json_flag, emit, output_file
from .flags import add_device_flag, add_model_flag, parse_device
from .text_flags import add_text_flags, read_held_out

if TYPE_CHECKING:
    from ..signals.kv import KvLayer, RoundTrip

SHOWN = (Precision.INT8, Precision.INT4, Precision.INT2)
BATCH = 8


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, measure, write the ranking and print the result."""
    args = _parser().parse_args(argv)

    import torch

    from ..checkpoint.models import load_model, quiet_transformers
    from ..signals.kv import collect_kv_fisher

    quiet_transformers(progress=sys.stderr.isatty())
    device = parse_device(args.device)
    model: Any = load_model(args.model)
    text = read_held_out(args, model)
    tokens = text.tokens
    layers = collect_kv_fisher(
        model.to(device),
        torch.split(tokens, BATCH),
        round_trips=codec_round_trips(SHOWN),
        seed=args.seed,
    )
    document = {
        "model": args.model,
        "text": text.source,
        "tokens": tokens.numel(),
        "seed": args.seed,
        **ranking_document(layers),
    }
    write_json(document, args.output)
    emit(ranking_table(layers), {"output": str(args.output), **document}, args.json)
    return 0


def codec_round_trips(precisions: Sequence[Precision]) -> "dict[str, RoundTrip]":
    """Return what a compressed cache of each precision does to keys and values."""
    from ..codecs.records import Codec
    from ..progressive.kv_cache import round_trip

    return {str(p): partial(round_trip, codec=Codec(p)) for p in precisions}


def ranking_document(layers: "Sequence[KvLayer]") -> dict[str, Any]:
    """Return the layers as JSON, least sensitive first."""
    order = sorted(layers, key=lambda layer: layer.trace)
    return {
        "cheapest_first": [layer.layer for layer in order],
        "layers": [
            {
                "layer": layer.layer,
                "block": layer.block,
                "fisher_trace": layer.trace,
                "keys_trace": layer.keys_trace,
                "values_trace": layer.values_trace,
                "predicted_kl": {name: d.total for name, d in layer.damage.items()},
            }
            for layer in order
        ],
    }


def ranking_table(layers: "Sequence[KvLayer]") -> str:
    """Return the ranking for a person."""
    names = list(layers[0].damage)
    lines = [f"{'layer':<6}{'block':<28}{'keys':>10}{'values':>10}  Fisher trace per token"]
    for layer in sorted(layers, key=lambda layer: layer.trace):
        costs: Mapping[str, Any] = layer.damage
        text = ", ".join(f"{name} {costs[name].total:.2g}" for name in names)
        lines.append(
            f"{layer.layer:<6}{layer.block:<28}{layer.keys_trace:>10.3g}{layer.values_trace:>10.3g}"
            f"  predicted KL: {text}"
        )
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__.split("\n\n")[0].strip())
    default = "(default: %(default)s)"
    add_model_flag(parser)
    add_device_flag(parser)
    add_text_flags(parser, samples=32, use="")
    parser.add_argument(
        "--output",
        type=output_file,
        default=Path("layer_ranking.json"),
        metavar="FILE",
        help=f"the ranking {default}",
    )
    add_json_flag(parser)
    return parser
