"""Say where a model's weights would go within a memory budget, and how fast that would be, without
running it.

    tierhints plan --model runs/quickstart/checkpoint --budget HBM=4MiB,SSD=

The model is built from its config.json without memory for its weights, and of a checkpoint only the
headers are read: models and sharded checkpoints larger than the memory can be planned for. Times
are those of the machine (make probe) played through on the planner's timeline, for one token.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..checkpoint.models import quiet_transformers
from ..files import check_writable
from ..report.plan_table import plan_sections
from ..tiering import plan
from ..tiering.planning.budget import read_budget
from .cli import emit_json
from .flags import add_model_flags, planned_device, planned_machine, planned_precision


def main(argv: Sequence[str] | None = None) -> int:
    """Plan, print and emit; returns the exit code."""
    args = _parser().parse_args(argv)
    check_writable(args.json)
    quiet_transformers(progress=False)
    planned = plan(
        args.model,
        args.tier_hints,
        budget=read_budget(args.budget),
        precision=planned_precision(args.precision),
        epsilon=args.epsilon,
        machine=planned_machine(args.machine),
        device=planned_device(args.device),
    )
    precision = args.precision or ("lossless" if args.epsilon is None else None)
    document = {"model": str(args.model), "precision": precision, **planned.to_json()}
    held = precision or f"epsilon {args.epsilon}"
    print(f"{args.model} on {planned.machine.name}, {held}, device {planned.device}\n")
    print(plan_sections(planned, document, every_block=args.blocks), end="\n\n")
    emit_json(document, args.json)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Plan a model's placement within a budget, and predict its speed, without "
        "running it.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong input, or a budget that is too small. The "
        "last line of stdout is JSON.",
    )
    add_model_flags(parser)
    parser.set_defaults(precision=None)  # lossless, or what --epsilon allows
    parser.add_argument(
        "--budget",
        required=True,
        metavar="TIER=SIZE,...",
        help="fast memory is HBM (RAM without an accelerator); no size: no limit; a tier left out "
        "is not used: HBM=700MiB,SSD=",
    )
    parser.add_argument(
        "--epsilon",
        metavar="BOUND",
        help="fewest bytes within this KL from the full model, or --precision where that is more: "
        "0.02 (nats per token) or ppl=1.02; needs calibrated --tier-hints (default: no bound)",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--blocks", action="store_true", help="a row for each block")
    output.add_argument(
        "--json", type=Path, metavar="FILE", help="write the last line's JSON here as well"
    )
    return parser
