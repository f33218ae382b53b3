"""Time attention over keys and values in full, over codes that are expanded first, and over codes.

    python scripts/experiments/progressive/attend_codes.py --json docs/results/attend_codes.json
    python scripts/experiments/progressive/attend_codes.py --tokens 1024 --batches 8 --rounds 3

One token of each of some requests attends in all layers of a model of SmolLM2-135M's shape. The
ways take turns; medians are of one token of one request, over all layers. With --processor-time
what other programs take of the machine doesn't count. docs/progressive.md says what figures mean.
"""

import copy
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

from lib.commands.cli import Parser, add_json_flag, emit, run_main
from lib.errors import InputError
from lib.progressive.ladder import KvShape, KvTier, LayerPrecisions
from lib.vocabulary import Precision

LAYERS, HEADS, ROWS, DIM = 30, 3, 3, 64
"""Of SmolLM2-135M; ``ROWS``: heads of queries that share one of keys."""
SCALE = DIM**-0.5
TIERS: dict[str, LayerPrecisions | None] = {
    "full": None,
    "K8V8": (Precision.INT8, Precision.INT8),
    "K6V5": (Precision.INT6, Precision.INT5),
    "K4V4": (Precision.INT4, Precision.INT4),
    "K3V2": (Precision.INT3, Precision.INT2),
}
EXPANDED = "K6V5"
_HEADS = "tokens  requests  way                        ms  of sdpa  MiB"

Way = Callable[[int], object]
"""Attends in one layer."""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if min(*args.tokens, *args.batches, args.rounds, args.threads) < 1:
        raise InputError("--tokens, --batches, --rounds and --threads: at least 1")
    import torch

    from scripts.experiments.offload.host import describe_machine

    clock = time.process_time if args.processor_time else time.perf_counter
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    points = []
    with torch.inference_mode():
        for tokens in args.tokens:
            for batch in args.batches:
                points += measure(tokens, batch, args.rounds, clock)
    document = {
        "machine": describe_machine("cpu", args.threads, None),
        "shape": {"layers": LAYERS, "heads": HEADS, "query_heads": HEADS * ROWS, "dim": DIM},
        "rounds": args.rounds,
        "clock": "processor" if args.processor_time else "wall",
        "points": points,
    }
    lines = [_HEADS] + [
        f"{each['tokens']:6}  {each['requests']:8}  {each['way']:<20}  {each['ms']:7.2f}"
        f"  {each['of_sdpa']:7.2f}  {each['bytes'] / 2**20:3.1f}"
        for each in points
    ]
    emit("\n".join(lines), document, args.json)
    return 0


def measure(
    tokens: int, requests: int, rounds: int, clock: Callable[[], float]
) -> list[dict[str, Any]]:
    """Return a point of the document for each way."""
    ways = make_ways(tokens, requests)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for warm_up in (True, *[False] * rounds):
        for name, (way, _) in ways.items():
            begin = clock()
            for layer in range(LAYERS):
                way(layer)
            if not warm_up:
                seconds[name].append(clock() - begin)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    return [
        {
            "tokens": tokens,
            "requests": requests,
            "way": name,
            "ms": 1e3 * medians[name] / requests,
            "of_sdpa": medians[name] / medians["sdpa, full"],
            "bytes": num_bytes,
        }
        for name, (_, num_bytes) in ways.items()
    ]


def make_ways(tokens: int, requests: int) -> dict[str, tuple[Way, int]]:
    """Return what is compared, and the bytes of keys and values that a request holds in it."""
    import torch

    from lib.codecs import ops
    from lib.progressive.kv.attention import attend, attend_reference

    ops.prepare("cpu")
    queries = torch.randn(requests, HEADS * ROWS, DIM)
    grouped = queries.view(requests, HEADS, ROWS, DIM)
    sides = torch.randn(2, LAYERS, requests, HEADS, tokens, DIM)
    full = sides.nbytes // requests
    codes, scales = quantize(sides)
    packed = (codes.nbytes + scales.nbytes) // requests
    keys_packed, values_packed = codes[0], codes[1].transpose(-1, -2).contiguous()
    ones = torch.ones(DIM)
    states = {name: fill(tier, sides, tokens, requests) for name, tier in TIERS.items()}

    def sdpa(layer: int) -> object:
        keys, values = sides[:, layer]
        return torch.nn.functional.scaled_dot_product_attention(
            queries.unsqueeze(2), keys, values, scale=SCALE, enable_gqa=True
        )

    def own(layer: int) -> object:
        return torch.ops.tierhints.attend(grouped, *sides[:, layer], None, SCALE)

    def pack(layer: int) -> object:
        """Both products from int8 by token; values' scales are multiplied into weights."""
        found = []
        for request, query in enumerate(grouped):
            for head in range(HEADS):
                at = layer, request, head
                scores = torch._weight_int8pack_mm(query[head], keys_packed[at], scales[0][at])
                weights = (scores * SCALE).softmax(-1) * scales[1][at]
                found.append(torch._weight_int8pack_mm(weights, values_packed[at], ones))
        return found

    ways: dict[str, tuple[Way, int]] = {
        "sdpa, full": (sdpa, full),
        "attend, full": (own, full),
        "int8pack, int8": (pack, packed),
    }
    for name, of in states.items():
        num_bytes = of[0].num_bytes
        if name == EXPANDED:
            ways[f"expanded, {name}"] = (
                lambda layer, of=of: attend_reference(  # type: ignore[misc]
                    queries, [each.layers[layer] for each in of], SCALE
                ),
                num_bytes,
            )
        ways[f"pages, {name}"] = (
            lambda layer, of=of: attend(queries, of, layer, SCALE),  # type: ignore[misc]
            num_bytes,
        )
    return ways


def quantize(sides: Any) -> tuple[Any, Any]:
    """Return int8 codes and scales by token of keys and values (2, layers, requests, heads, tokens,
    dim).
    """
    import torch

    scales = sides.abs().amax(-1) / 127
    return (sides / scales.unsqueeze(-1)).round().to(torch.int8), scales


def fill(precisions: LayerPrecisions | None, sides: Any, tokens: int, requests: int) -> list[Any]:
    """Return states of some requests at a tier; all hold those of the first."""
    from lib.progressive.kv.pages import RequestStates

    shape = KvShape(layers=LAYERS, heads=HEADS, key_dim=DIM, value_dim=DIM, itemsize=4)
    tier = KvTier(name="", precisions=None if precisions is None else (precisions,) * LAYERS)
    states = RequestStates(shape, tier)
    for layer in range(LAYERS):
        keys, values = sides[:, layer, 0].transpose(1, 2)
        states.append(layer, keys, values)
        states.settle(layer)
    return [states, *(copy.deepcopy(states) for _ in range(requests - 1))]


def _parser() -> Parser:
    parser = Parser("Time attention over keys and values in full, and over codes.")
    for flag, default, what in (
        ("--tokens", [512, 1024, 2048], "that are attended to"),
        ("--batches", [1, 4, 8], "requests that attend together"),
    ):
        text = f"{what} (default: {' '.join(map(str, default))})"
        parser.add_argument(flag, type=int, nargs="+", default=default, metavar="N", help=text)
    for flag, count, what in (
        ("--rounds", 9, "turns of each way"),
        ("--threads", os.cpu_count(), "of the kernels"),
    ):
        text = f"{what} (default: {count})"
        parser.add_argument(flag, type=int, default=count, metavar="N", help=text)
    parser.add_argument(
        "--processor-time", action="store_true", help="count that of all threads, not the wall's"
    )
    add_json_flag(parser)
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
