"""Ask what a faster link or more memory would bring: bandwidth times budget, through the planner.

    tierhints what-if --model runs/quickstart/checkpoint --tier SSD --bandwidth 1,3,7,14,50

Each point is a plan of its own, made for that bandwidth and played through on the timeline: nothing
runs. Compute is that of the machine file at every point.
"""

import argparse
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from ..checkpoint.models import quiet_transformers
from ..errors import InputError
from ..machine import MachineProfile, TierSpec, choose_machine, machine_to_json
from ..progress import show_progress
from ..report.drawing import need_matplotlib
from ..report.what_if_plots import plot_what_if
from ..tiering import Planned, plan
from ..units import format_bytes
from ..vocabulary import Precision, Tier
from .cli import Parser, add_json_flag, emit, output_file
from .flags import (
    add_planning_flags,
    note_unmeasured,
    planned_device,
    planned_precision,
    read_budgets,
)

LINK_TIERS = [tier for tier in Tier if tier is not Tier.HBM]


def main(argv: Sequence[str] | None = None) -> int:
    """Sweep, print and plot; returns the exit code."""
    args = _parser().parse_args(argv)
    if args.plot is not None:
        need_matplotlib()
    bandwidths = read_bandwidths(args.bandwidth)
    machine = choose_machine(args.machine)
    tier = Tier(args.tier)
    base = link_spec(machine, tier, args.setup_us)
    precision = planned_precision(args.precision)
    quiet_transformers(progress=False)
    supposed = dataclasses.replace(machine, capacity_bytes={}, measured=False)
    whole = plan(
        args.model,
        args.tier_hints,
        mode="emulated",  # of machines that may not exist: what this one lacks doesn't matter
        budget={Tier.HBM: None},
        precision=precision,
        machine=supposed,
        device=planned_device(args.device),
    )
    budgets = read_budgets(args.budgets, whole.weight_bytes)
    specs = [dataclasses.replace(base, bandwidth_gb_s=bandwidth) for bandwidth in bandwidths]
    machines = [
        dataclasses.replace(supposed, tiers={**supposed.tiers, tier: spec}) for spec in specs
    ]
    note_unmeasured(machine)
    rows = sweep(whole, precision, machines, tier, budgets)
    resident = 1 / whole.plan.predicted.seconds
    document = {
        "model": str(args.model),
        "precision": args.precision,
        "machine": machine_to_json(machine),
        "tier": str(tier),
        "setup_us": base.setup_us,
        "weight_bytes": whole.weight_bytes,
        "resident_tokens_per_s": resident,
        "rows": rows,
    }
    table = (
        f"{args.model}, {args.precision}, {format_bytes(whole.weight_bytes)}: predicted tokens per "
        f"second, weights in HBM and {tier}\n\n{_table(rows, resident)}"
    )
    if args.plot is not None:
        plot_what_if(document, args.plot)
        table += f"\n\nplot: {args.plot}"
    emit(table, document, args.json)
    return 0


def sweep(
    whole: Planned,
    precision: Precision | None,
    machines: Sequence[MachineProfile],
    tier: Tier,
    budgets: Sequence[tuple[str, int]],
) -> list[dict[str, Any]]:
    """Plan each budget on each machine, for the model of ``whole``; ``tokens_per_s`` is None where
    a budget is too small.
    """
    ask = functools.partial(
        plan, whole.model, whole.hints, mode="emulated", precision=precision, device=whole.device
    )
    # With one tier below, what it takes at least is the same at every bandwidth.
    smallest = ask(budget={Tier.HBM: None, tier: None}, machine=machines[0]).smallest_hbm_bytes
    assert smallest is not None
    rows = []
    for label, size in budgets:
        for machine in show_progress(machines, f"HBM={label}", total=len(machines)):
            row: dict[str, Any] = {
                "budget": label,
                "hbm_bytes": size,
                "bandwidth_gb_s": machine.tiers[tier].bandwidth_gb_s,
                "smallest_hbm_bytes": smallest,
                "tokens_per_s": None,
                "ms_per_token": None,
                "bytes_per_token": None,
                "link_utilisation": None,
            }
            if smallest <= size:
                budget = {Tier.HBM: size, tier: None}
                predicted = ask(budget=budget, machine=machine).plan.predicted
                row |= {
                    "tokens_per_s": 1 / predicted.seconds,
                    "ms_per_token": predicted.seconds * 1e3,
                    "bytes_per_token": predicted.moved_bytes,
                    "link_utilisation": predicted.link_seconds / predicted.seconds,
                }
            rows.append(row)
    return rows


def link_spec(machine: MachineProfile, tier: Tier, setup_us: float | None) -> TierSpec:
    """Return the machine's figures of a tier, or those of one that it lacks; raises InputError."""
    spec = machine.tiers.get(tier)
    if setup_us is None and spec is None:
        raise InputError(
            f"machine {machine.name!r} has no {tier}: give --setup-us, or a machine file that has"
        )
    if spec is None or setup_us is not None:
        name = str(tier) if spec is None else spec.name
        spec = TierSpec(name, setup_us if setup_us is not None else 0.0, 1.0)
    return spec


def read_bandwidths(text: str) -> list[float]:
    """Read ``1,3,7``: GB/s, each more than 0; raises InputError."""
    bandwidths = []
    for entry in text.split(","):
        try:
            bandwidth = float(entry)
        except ValueError:
            bandwidth = 0.0
        if not 0 < bandwidth < float("inf"):
            raise InputError(
                f"--bandwidth {entry!r} is not a bandwidth in GB/s above 0: give such as 1,3,7"
            )
        bandwidths.append(bandwidth)
    return sorted(set(bandwidths))


def _table(rows: Sequence[dict[str, Any]], resident: float) -> str:
    bandwidths = list(dict.fromkeys(row["bandwidth_gb_s"] for row in rows))
    header = f"{'HBM budget':22}" + "".join(f"{value:>10g}" for value in bandwidths) + "  GB/s"
    lines = [header]
    for label in dict.fromkeys(row["budget"] for row in rows):
        mine = [row for row in rows if row["budget"] == label]
        size = format_bytes(mine[0]["hbm_bytes"])
        cells = "".join(
            f"{'-':>10}" if row["tokens_per_s"] is None else f"{row['tokens_per_s']:>10.3g}"
            for row in mine
        )
        lines.append(f"{label if label == size else f'{label} ({size})':22}{cells}")
    lines.append(f"everything resident: {resident:.3g} tokens/s")
    if any(row["tokens_per_s"] is None for row in rows):
        smallest = format_bytes(min(row["smallest_hbm_bytes"] for row in rows))
        lines.append(f"-: too small; the smallest budget that works is {smallest}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "Predict tokens per second over bandwidth and budget, for machines that may not exist."
    )
    add_planning_flags(parser)
    sweep_flags = parser.add_argument_group("sweep")
    sweep_flags.add_argument(
        "--precision",
        choices=["lossless", *map(str, Precision)],
        default="lossless",
        help="of all matrices, though none below its floor (default: %(default)s)",
    )
    sweep_flags.add_argument(
        "--tier",
        choices=list(map(str, LINK_TIERS)),
        default=str(Tier.SSD),
        help="where streamed weights lie, and whose bandwidth is varied (default: %(default)s)",
    )
    sweep_flags.add_argument(
        "--bandwidth",
        default="1,3,7,14,50,400",
        metavar="GB/S,...",
        help="bandwidths of the tier's link (default: %(default)s)",
    )
    sweep_flags.add_argument(
        "--budgets",
        default="25%,50%,75%,100%",
        metavar="SIZE,...",
        help="fast memory: shares of the model's bytes at the precision, or sizes (default: "
        "25%%,50%%,75%%,100%%)",
    )
    sweep_flags.add_argument(
        "--setup-us",
        type=float,
        metavar="US",
        help="setup time of a transfer (default: the machine file's)",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--plot", type=output_file, metavar="FILE", help="PNG to draw")
    add_json_flag(output)
    return parser
