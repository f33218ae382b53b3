"""Play a controller's log again: the same observations must give the same decisions.

    tierhints replay control.jsonl
    tierhints replay control.jsonl --machine cxl.json --tier CXL

The first form decides again from what was observed, and exits with 1 at the first difference. With
--policy, --budget or --machine it says what would have happened instead, which is simulated.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..machine import choose_machine
from ..policy.replay import Log, read_log, replay
from ..policy.suppose import POLICIES, suppose
from ..units import format_bytes, parse_bytes
from ..vocabulary import Tier
from .cli import Parser, add_json_flag, emit


def main(argv: Sequence[str] | None = None) -> int:
    """Replay, or suppose; returns the exit code."""
    args = _parser().parse_args(argv)
    if args.tier is not None and args.machine is None:
        raise InputError("--tier says which tier of --machine holds what is away: give both")
    try:
        text = args.log.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"the log {args.log} can't be read: {error.strerror}") from error
    log = read_log(text.split("\n"))
    if args.policy is None and args.budget is None and args.machine is None:
        return _replay(log, args)
    return _suppose(log, args)


def _replay(log: Log, args: argparse.Namespace) -> int:
    difference = replay(log)
    observations = sum(len(run.entries) for run in log.runs)
    decisions = sum(entry.decision is not None for run in log.runs for entry in run.entries)
    document = {
        "log": str(args.log),
        "runs": len(log.runs),
        "observations": observations,
        "decisions": decisions,
        "torn_lines": log.torn,
        "identical": difference is None,
        "first_difference": None if difference is None else asdict(difference),
    }
    lines = [f"{len(log.runs)} runs, {observations} observations, {decisions} decisions"]
    if log.torn:
        lines.append(f"left out, since torn: line {', '.join(map(str, log.torn))}")
    if difference is None:
        lines.append("all decisions are the same again")
    else:
        lines.append(
            f"line {difference.line}, observation {difference.sequence}: another "
            f"{difference.what}\n  logged:   {difference.logged}\n  replayed: {difference.replayed}"
        )
    emit("\n".join(lines), document, args.json)
    return 0 if difference is None else 1


def _suppose(log: Log, args: argparse.Namespace) -> int:
    limit = None if args.budget is None else parse_bytes(args.budget)
    tiers = None
    if args.machine is not None:
        machine = choose_machine(args.machine)
        if args.tier is not None and Tier(args.tier) not in machine.tiers:
            raise InputError(f"{args.machine} has no {args.tier}: choose one of its tiers")
        tiers = dict(machine.tiers)
        if args.tier is not None:  # the tier below is then this one
            tiers |= {tier: machine.tiers[Tier(args.tier)] for tier in tiers if tier != Tier.HBM}
    runs: list[dict[str, Any]] = []
    for run in log.runs:
        known = None if tiers is None else {**run.tiers, **tiers}
        policy = args.policy or "ours"
        runs.append(suppose(run, policy=policy, limit_bytes=limit, tiers=known).to_json())
    document = {
        "log": str(args.log),
        "simulated": True,
        "policy": args.policy or "ours",
        "budget_bytes": limit,
        "machine": None if args.machine is None else str(args.machine),
        "tier": args.tier,
        "runs": runs,
    }
    emit("\n\n".join(map(_table, runs)), document, args.json)
    return 0


def _table(run: dict[str, Any]) -> str:
    lines = [f"{'from':>8} {'until':>8} {'limit':>11} {'fast memory':>12} {'ms/token':>9}"]
    for phase in run["phases"]:
        limit = phase["limit_bytes"]
        lines.append(
            f"{phase['from_s']:7.2f}s {phase['until_s']:7.2f}s "
            f"{'none' if limit is None else format_bytes(limit):>11} "
            f"{format_bytes(phase['fast_bytes']):>12} {phase['ms_per_token']:9.2f}"
        )
    rate = run["tokens_per_s"]
    lines.append(
        f"simulated: {0 if rate is None else rate:.3g} tokens/s over {run['seconds']:.1f} s, "
        f"{run['transitions']} transitions, at most {run['transitions_per_block_max']} of a block"
    )
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = Parser("Play a controller's log again, or ask what would have happened instead.")
    parser.add_argument("log", type=Path, metavar="LOG", help="what Runtime.control(log=) wrote")
    what_if = parser.add_argument_group("instead (simulated)")
    what_if.add_argument(
        "--policy",
        choices=list(POLICIES),
        help="eager: without dwell and buckets; never-grow: shrinks only",
    )
    what_if.add_argument(
        "--budget", metavar="SIZE", help="the smallest that was ever asked for, such as 400MiB"
    )
    what_if.add_argument("--machine", type=Path, metavar="FILE", help="a machine.json")
    what_if.add_argument(
        "--tier",
        choices=[str(tier) for tier in Tier if tier is not Tier.HBM],
        help="the tier of --machine that holds what is away (default: the log's)",
    )
    output = parser.add_argument_group("output")
    add_json_flag(output)
    return parser
