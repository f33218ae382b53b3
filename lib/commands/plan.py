"""Say where a model's weights would go within a memory budget, and how fast that would be, without
running it.

    tierhints plan --model runs/quickstart/checkpoint --budget HBM=4MiB,SSD=

The model is built from its config.json without memory for its weights, and of a checkpoint only the
headers are read: models and sharded checkpoints larger than the memory can be planned for. Times
are those of the machine (tierhints probe) played through on the planner's timeline, for one token.
"""

import argparse
from collections.abc import Sequence

from ..checkpoint.models import quiet_transformers
from ..machine import choose_machine
from ..progressive.division import divide
from ..progressive.requests import check_can_draft
from ..report.plan_table import division_text, plan_sections
from ..tiering import plan
from ..tiering.planning.budget import read_budget
from .cli import Parser, add_json_flag, emit
from .flags import (
    add_budget_flag,
    add_planning_flags,
    add_precision_flags,
    check_epsilon,
    note_unmeasured,
    planned_device,
    planned_precision,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Plan, print and emit; returns the exit code."""
    args = _parser().parse_args(argv)
    check_epsilon(args)
    quiet_transformers(progress=False)
    machine = choose_machine(args.machine)
    given = {
        "budget": read_budget(args.budget),
        "precision": planned_precision(args.precision),
        "epsilon": args.epsilon,
        "machine": machine,
        "device": planned_device(args.device),
    }
    division = divide(args.model, args.tier_hints, **given) if args.exact else None
    planned = plan(args.model, args.tier_hints, **given) if division is None else division.full
    if division is not None:
        check_can_draft(planned.model)
    note_unmeasured(machine)
    lossless = args.exact or args.epsilon is None
    precision = None if args.exact else args.precision
    precision = precision or ("lossless" if lossless else None)
    document = {
        "model": str(args.model),
        "precision": precision,
        **planned.to_json(),
        "exact": None if division is None else division.to_json(),
    }
    held = precision or f"epsilon {args.epsilon}"
    head = f"{args.model} on {planned.machine.name}, {held}, device {planned.device}"
    table = plan_sections(planned, document, every_block=args.blocks)
    if division is not None:
        table += f"\n\n{division_text(division.to_json())}"
    emit(f"{head}\n\n{table}", document, args.json)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "Plan a model's placement within a budget, and predict its speed, without running it."
    )
    add_planning_flags(parser)
    plan_flags = parser.add_argument_group("plan")
    add_budget_flag(plan_flags, required=True)
    add_precision_flags(plan_flags)
    plan_flags.add_argument(
        "--exact",
        action="store_true",
        help="as generate --exact divides the budget: a draft (of --precision or --epsilon, "
        "default: the one predicted to be the fastest) resides, the full weights stream beside it",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--blocks", action="store_true", help="a row for each block")
    add_json_flag(output)
    return parser
