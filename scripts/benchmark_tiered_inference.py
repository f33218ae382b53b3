"""Measure what a tier_hints.json does to inference, against the untouched model.

    python scripts/benchmark_tiered_inference.py --model runs/quickstart/checkpoint \
        --tier-hints runs/quickstart/tier_hints.json --mode real --baseline --json out.json

`tierhints benchmark` with flags that don't change: by default emulated, without a baseline, on the
checkpoint's own held-out text. stdout gets three sections and, as its last line, one JSON document,
on a terminal too, whose fields docs/benchmark.md names.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout

from lib.commands.benchmark import (
    DEFAULT_LENGTH,
    add_mode_flags,
    add_pass_flags,
    add_weights_flags,
    run_benchmark,
)
from lib.commands.cli import run_main
from lib.errors import InputError
from lib.files import check_writable, write_json
from lib.report import benchmark_sections
from lib.vocabulary import Precision


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.seq_length is not None and args.seq_length < 2:
        raise InputError(f"--seq-length {args.seq_length} is too small: give 2 or more")
    check_writable(args.json)
    document = run_benchmark(args, lambda model: _sequence_length(args.seq_length, model))
    print(benchmark_sections(document), end="\n\n")
    if args.json is not None:
        write_json(document, args.json)
    print(json.dumps(document, allow_nan=False), flush=True)
    return 0


def _sequence_length(asked: int | None, model: Any) -> int:
    """Return the tokens per sequence that were asked for, or a default that the context holds."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if asked is None:
        return min(DEFAULT_LENGTH, context or DEFAULT_LENGTH)
    if context is not None and asked > context:
        raise InputError(
            f"--seq-length {asked} is longer than the model's context: give {context} or less"
        )
    return asked


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Benchmark a causal language model, its weights placed by tier_hints.json.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong input. The last line of stdout is JSON.",
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", required=True, help="Hub id, or folder with config.json and weights"
    )
    model.add_argument(
        "--tier-hints",
        required=True,
        type=Path,
        metavar="FILE",
        help="tier_hints.json of this model",
    )
    add_weights_flags(model)
    model.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)"
    )
    tiers = parser.add_argument_group("tiering")
    tiers.add_argument(
        "--budget",
        metavar="TIER=SIZE,...",
        help="place by bytes per tier, not by the hints: HBM=700MiB,SSD= (no size: no limit)",
    )
    tiers.add_argument(
        "--precision",
        choices=[str(precision) for precision in Precision],
        help="hold the weights so, or at their floor (default: as they are, lossless)",
    )
    tiers.add_argument(
        "--epsilon",
        metavar="BOUND",
        help="fewest bytes within this KL from the full model: 0.02 (nats per token) or ppl=1.02; "
        "needs calibrated hints, and implies --baseline (default: no bound)",
    )
    add_mode_flags(tiers, mode="emulated")
    tiers.add_argument(
        "--baseline", action="store_true", help="measure the untouched model too, and compare"
    )
    work = parser.add_argument_group("workload")
    work.add_argument(
        "--seq-length",
        type=int,
        help=f"tokens per sequence (default: {DEFAULT_LENGTH}, or the context if shorter)",
    )
    add_pass_flags(work)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the JSON document here as well"
    )
    parser.set_defaults(
        data=None, samples=sys.maxsize, seed=0
    )  # the checkpoint's own text, all of it
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
