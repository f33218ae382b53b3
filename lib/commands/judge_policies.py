"""Judge policies of expert residency on a recording of what routers chose.

    tierhints judge-policies trace.csv.gz --resident 0.05,0.1,0.2,0.3,0.4

The recording is a route_trace v1, such as tierhints trace writes. Each policy holds that share of
all experts; hit rates are those of decode steps, after the prompts have gone through, and first
uses are misses. "belady" knows the future: nothing hits more.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..evaluation.route_traces import read_trace
from ..policy.experts.judge import Verdict, judge, slots_of
from ..policy.experts.routing import Trace
from ..progress import show_progress
from ..units import format_bytes
from .cli import Parser, add_json_flag, emit

SHOWN = ("ours", "lru", "lfu", "popularity", "belady")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, replay, print the result."""
    args = _parser().parse_args(argv)
    shares = read_shares(args.resident)
    trace = read_trace(args.trace)
    for share in shares.values():  # before the work starts
        slots_of(trace, share)
    verdicts = {
        name: judge(trace, share)
        for name, share in show_progress(shares.items(), "shares", total=len(shares))
    }
    emit(_table(trace, verdicts), _document(trace, verdicts), args.json)
    return 0


def read_shares(text: str) -> dict[str, float]:
    """Read ``0.05,0.1``: by name, shares above 0 up to 1; raises InputError."""
    shares = {}
    for entry in text.split(","):
        try:
            share = float(entry)
        except ValueError:
            share = 0.0
        if not 0 < share <= 1:
            raise InputError(f"--resident {entry!r} is not a share above 0 up to 1: give 0.05,0.1")
        shares[f"{share:g}"] = share
    return shares


def _document(trace: Trace, verdicts: dict[str, Verdict]) -> dict[str, Any]:
    return {
        "model": trace.model,
        "experts": trace.num_experts,
        "decode_steps": trace.decode_steps,
        "details": {
            name: {
                "slots": verdict.slots,
                "below_cycle": verdict.below_cycle,
                "uses": verdict.uses,
                "bytes_missed": verdict.bytes_missed,
                "closed": verdict.closed,
                "times_belady": verdict.times_belady,
            }
            for name, verdict in verdicts.items()
        },
        "resident": {
            name: {policy: verdict.hit_rate(policy) for policy in SHOWN}
            for name, verdict in verdicts.items()
        },
    }


def _table(trace: Trace, verdicts: dict[str, Verdict]) -> str:
    lines = [
        f"{trace.model or 'a mixture'}: {len(trace.experts)} layers, {trace.num_experts} experts, "
        f"{trace.decode_steps} decode steps; hits in % of uses",
        "",
        f"{'resident':>9}{'slots':>7}"
        + "".join(f"{policy:>11}" for policy in SHOWN)
        + f"{'gap closed':>12}{'reads/least':>13}{'ours reads/step':>17}",
    ]
    for name, verdict in verdicts.items():
        rates = "".join(f"{100 * verdict.hit_rate(policy):>11.1f}" for policy in SHOWN)
        closed, times = verdict.closed, verdict.times_belady
        read = format_bytes(verdict.bytes_missed["ours"] // max(1, trace.decode_steps))
        lines.append(
            f"{name + ('*' if verdict.below_cycle else ''):>9}{verdict.slots:>7}{rates}"
            + f"{'-' if closed is None else f'{closed:.0%}':>12}"
            + f"{'-' if times is None else f'{times:.2f}':>13}{read:>17}"
        )
    lines.append("")
    lines.append("gap closed: of the way from lru to belady; reads/least: ours by belady's")
    if any(verdict.below_cycle for verdict in verdicts.values()):
        lines.append("*: one token uses more than there is room for, where lru falls off a cliff")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__.split("\n\n")[0].strip())
    parser.add_argument(
        "trace", type=Path, metavar="TRACE", help="a route_trace v1: a CSV, or .gz of one"
    )
    parser.add_argument(
        "--resident",
        default="0.05,0.1,0.2,0.3,0.4",
        metavar="SHARE,...",
        help="shares of all experts that are held (default: %(default)s)",
    )
    add_json_flag(parser)
    return parser
