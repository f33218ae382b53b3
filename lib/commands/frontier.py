"""Measure a model's frontier: fast memory against tokens per second against KL, for budgets and
precisions, ours beside uniform precision.

    tierhints frontier --model runs/quickstart/checkpoint \
        --tier-hints runs/quickstart/tier_hints.json --plot frontier.png

Each point attaches the model, decodes, and compares it with the full model on held-out text.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from ..hints import load_hints
from ..report.drawing import need_matplotlib
from ..report.frontier import frontier_table, plot_frontier
from ..units import GIB, format_bytes
from .cli import Parser, add_json_flag, emit, output_file
from .flags import add_device_flag, add_hints_flag, add_model_flag, parse_device, read_budgets
from .text_flags import add_text_flags, read_held_out


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and draw; returns the exit code."""
    args = _parser().parse_args(argv)
    if args.plot is not None:
        need_matplotlib()
    if args.budgets is not None:
        read_budgets(args.budgets, GIB)  # refused at once, and shares made bytes of below
    hints = None if args.tier_hints is None else load_hints(args.tier_hints)

    from ..blocks import storage_bytes
    from ..checkpoint.models import load_model, quiet_transformers
    from ..evaluation.frontier import default_settings, measure_frontier

    device = parse_device(args.device)
    quiet_transformers(progress=sys.stderr.isatty())
    model: Any = load_model(args.model)
    text = read_held_out(args, model)
    full_bytes = storage_bytes(model.parameters())
    budgets = None if args.budgets is None else read_budgets(args.budgets, full_bytes)
    settings = default_settings(
        full_bytes,
        calibrated=hints is not None and bool(hints.quality.get("calibrated")),
        budgets=None if budgets is None else [size for _, size in budgets],
    )
    found = measure_frontier(model, text.tokens, hints, settings=settings, device=device)
    document = {
        "model": args.model,
        "tier_hints": None if args.tier_hints is None else str(args.tier_hints),
        "text": {"source": text.source, "tokens": found.tokens},
        "device": str(device),
        **found.to_json(),
    }
    head = f"{args.model}, {format_bytes(found.full.fast_bytes)} of weights, on {device}"
    table = f"{head}\n\n{frontier_table(document)}"
    if args.plot is not None:
        plot_frontier(document, args.plot)
        table += f"\n\nplot: {args.plot}"
    emit(table, document, args.json)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "Measure fast memory against tokens per second against KL, over budgets and precisions."
    )
    model = parser.add_argument_group("model")
    add_model_flag(model)
    add_hints_flag(model)
    add_device_flag(model)
    model.add_argument(
        "--budgets",
        metavar="SIZE,...",
        help="fast memory to stream weights under: sizes, or shares of the model's such as 25%% "
        "(default: 50%%,20%%)",
    )
    add_text_flags(parser, samples=64, use="")
    output = parser.add_argument_group("output")
    output.add_argument("--plot", type=output_file, metavar="FILE", help="PNG to draw")
    add_json_flag(output)
    return parser
