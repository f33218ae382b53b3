"""Say where a model's weights would go within a memory budget, and how fast that would be, without
running it.

    tierhints plan --model runs/quickstart/checkpoint --budget HBM=4MiB,SSD=

The model is built from its config.json without memory for its weights, and of a checkpoint only the
headers are read: models and sharded checkpoints larger than the memory can be planned for. Times
are those of the machine (make probe) played through on the planner's timeline, for one token.
"""

import argparse
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..blocks import partition_model, tied_modules
from ..checkpoint.load import build_empty_model, load
from ..checkpoint.models import quiet_transformers
from ..files import check_writable
from ..hints import Hints, load_hints, match_hints
from ..machine import MachineProfile
from ..policy import BlockNeed, Plan, definition_schedule, make_plan, smallest_budget
from ..policy.veto import Veto
from ..precision.floors import Ledger
from ..tiering.planning.budget import parse_budget, read_budget
from ..tiering.planning.ledger import ledger_of, may_stream
from ..tiering.planning.needs import PrecisionChoice, model_needs
from ..units import GB, format_bytes
from ..vocabulary import Precision, Tier
from .cli import emit_json
from .flags import add_model_flags, planned_device, planned_machine


def main(argv: Sequence[str] | None = None) -> int:
    """Plan, print and emit; returns the exit code."""
    args = _parser().parse_args(argv)
    check_writable(args.json)
    quiet_transformers(progress=False)
    device = planned_device(args.device)
    budget = parse_budget(read_budget(args.budget), device, "real")
    machine = planned_machine(args.machine)
    model, hints = read_model(args)
    ledger = ledger_of(
        model,
        partition_model(model),
        hints,
        epsilon=args.epsilon,
        streams=may_stream(budget),
        device=device,
    )
    needs, scratch_bytes = read_needs(args, model, hints, device, machine, ledger)
    schedule = definition_schedule(needs)
    plan = make_plan(needs, schedule, budget, machine, scratch_bytes)
    veto = Veto(ledger)
    veto.judge(plan)
    veto.adopt(plan)
    limit = limit_seconds(needs, plan, machine)
    held = args.precision or ("lossless" if args.epsilon is None else f"epsilon {args.epsilon}")
    print(f"{args.model} on {machine.name}, {held}, device {device}\n")
    print(_block_table(needs, plan, machine, every_block=args.blocks), end="\n\n")
    print(_summary(plan, machine, limit), end="\n\n")
    if args.epsilon is not None:
        print(_quality_text(veto, plan), end="\n\n")
    document = {
        "model": str(args.model),
        "precision": args.precision or ("lossless" if args.epsilon is None else None),
        "device": str(device),
        "machine": {"name": machine.name, "measured": machine.measured},
        "weight_bytes": sum(need.resident_bytes for need in needs),
        "smallest_hbm_bytes": smallest_budget(needs, schedule, budget, machine, scratch_bytes),
        "predicted": {
            "ms_per_token": plan.predicted.seconds * 1e3,
            "tokens_per_s": 1 / plan.predicted.seconds if plan.predicted.seconds else None,
            "peak_fast_bytes": plan.fast_bytes,
            "bytes_per_token": plan.predicted.moved_bytes,
        },
        "limit_ms_per_token": limit * 1e3,
        "quality": None if args.epsilon is None else quality_to_json(veto, plan),
        "plan": plan.to_json(),
    }
    emit_json(document, args.json)
    return 0


def read_model(args: argparse.Namespace) -> tuple[torch.nn.Module, Hints | None]:
    """Build the model without weights, by its checkpoint's headers where there is one, and load its
    hints.
    """
    saved = any(args.model.glob("*.safetensors*"))
    model = load(args.model) if saved else build_empty_model(args.model)
    return model, _read_hints(args.hints, model)


def read_needs(
    args: argparse.Namespace,
    model: torch.nn.Module,
    hints: Hints | None,
    device: torch.device,
    machine: MachineProfile,
    ledger: Ledger | None = None,
) -> tuple[list[BlockNeed], int]:
    """Return what the blocks of a model ask for, and the scratch bytes. Without ``--precision``
    they are lossless, or under a quality bound at the floors of its ledger.
    """
    precision: PrecisionChoice = None
    if args.precision is None and ledger is not None and math.isfinite(ledger.epsilon):
        precision = ledger.floors
    elif args.precision is not None:
        precision = Precision.FP32 if args.precision == "lossless" else Precision(args.precision)
    return model_needs(
        model, precision=precision, hints=hints, device=device, machine=machine, ledger=ledger
    )


def quality_to_json(veto: Veto, plan: Plan) -> dict[str, Any]:
    """Return what a plan was predicted to cost, by block and altogether, in nats per token."""
    ledger = veto.ledger
    return {
        **veto.to_json(),
        "blocks": {
            name: {
                "floor": str(ledger.floors[name]),
                "predicted_nats": ledger.predicted(name, place.precision),
                "bound_nats": ledger.bound(name, place.precision),
            }
            for name, place in plan.placements.items()
        },
    }


def limit_seconds(needs: Sequence[BlockNeed], plan: Plan, machine: MachineProfile) -> float:
    """Return what no runtime can beat with this budget: all bytes that don't fit cross their links
    once, without setup, slots or gaps, the fastest tier filled first; or the compute, if longer.
    """
    streamable = [need for need in needs if not (need.lookup_bytes and need.uses == 1)]
    fast = plan.budget[Tier.HBM]
    left = 0
    if fast is not None:
        left = max(sum(need.stored_bytes for need in streamable) - fast, 0)
    seconds = plan.predicted.compute_seconds
    below = sorted(
        (tier for tier in plan.budget if tier is not Tier.HBM),
        key=lambda tier: -machine.tiers[tier].bandwidth_gb_s,
    )
    for tier in below:
        limit = plan.budget[tier]
        share = left if limit is None else min(left, limit)
        seconds = max(seconds, share / (machine.tiers[tier].bandwidth_gb_s * GB))
        left -= share
    return seconds


def _read_hints(path: Path | None, model: torch.nn.Module) -> Hints | None:
    """Load hints for the model; its weights aren't read, so whether they are the hints' is open."""
    if path is None:
        return None
    hints = load_hints(path)
    blocks = partition_model(model)
    matched = match_hints(
        hints,
        [block.name for block in blocks],
        parameter_digest=None,
        tied=tied_modules(blocks),
    )
    return replace(hints, blocks=matched)


def _block_table(
    needs: Iterable[BlockNeed], plan: Plan, machine: MachineProfile, *, every_block: bool
) -> str:
    """Print blocks of a kind in one place as a row, or each block, with what one token moves."""
    rows: dict[tuple[str, ...], list[BlockNeed]] = {}
    for need in needs:
        placement = plan.placements[need.name]
        label = need.name if every_block else need.kind
        place = (placement.precision, placement.tier, placement.state)
        rows.setdefault((label, *map(str, place)), []).append(need)
    width = max([12, *(len(key[0]) for key in rows)])
    what = "block" if every_block else "kind"
    lines = [
        f"{what:{width}}  {'precision':9}  {'tier':6}  {'state':5}  {'blocks':>6}  {'bytes':>10}  "
        f"{'link/token':>10}  layers"
    ]
    tiers, labels = list(map(str, Tier)), list(dict.fromkeys(key[0] for key in rows))
    ordered = sorted(rows, key=lambda key: (labels.index(key[0]), tiers.index(key[2])))
    for key in [*rows] if every_block else ordered:
        label, precision, tier, state = key
        members = rows[key]
        places = [plan.placements[need.name] for need in members]
        held = sum(place.resident_bytes or place.stored_bytes for place in places)
        milliseconds = sum(_link_ms(need, plan, machine) for need in members)
        link = f"{milliseconds:7.1f} ms" if milliseconds else "-"
        layers = _ranges(need.layer for need in members)
        lines.append(
            f"{label:{width}}  {precision:9}  {tier:6}  {state:5}  {len(members):6}  "
            f"{format_bytes(held):>10}  {link:>10}  {layers}".rstrip()
        )
    return "\n".join(lines)


def _link_ms(need: BlockNeed, plan: Plan, machine: MachineProfile) -> float:
    """Return the milliseconds of its link that a block takes per token."""
    placement = plan.placements[need.name]
    if placement.tier is Tier.HBM:
        return 0.0
    spec = machine.tiers[placement.tier]
    lookups = min(need.uses, 1) if need.lookup_bytes else 0
    seconds = lookups * spec.transfer_seconds(need.lookup_bytes)
    units = sum(map(spec.transfer_seconds, placement.unit_bytes))
    return (seconds + (need.uses - lookups) * units) * 1e3


def _ranges(layers: Iterable[int | None]) -> str:
    """Print layer numbers as ranges: 0-3, 7."""
    numbers = sorted({layer for layer in layers if layer is not None})
    starts = [number for number in numbers if number - 1 not in numbers]
    ends = [number for number in numbers if number + 1 not in numbers]
    return ", ".join(
        str(start) if start == end else f"{start}-{end}"
        for start, end in zip(starts, ends, strict=True)
    )


def _summary(plan: Plan, machine: MachineProfile, limit: float) -> str:
    predicted = plan.predicted
    lines = []
    for tier, num_bytes in plan.bytes_per_tier().items():
        given = plan.budget[tier]
        of = "no limit" if given is None else f"of {format_bytes(given)}"
        lines.append(f"{tier + ' weights':22}{format_bytes(num_bytes):>12}   {of}")
    slots = plan.num_slots * plan.slot_bytes
    lines += [
        f"{'slots':22}{format_bytes(slots):>12}   {plan.num_slots} of "
        f"{format_bytes(plan.slot_bytes)}",
        f"{'working memory':22}{format_bytes(plan.scratch_bytes):>12}",
        f"{'peak fast memory':22}{format_bytes(plan.fast_bytes):>12}   predicted",
        f"{'moved per token':22}{format_bytes(predicted.moved_bytes):>12}",
        f"{'time per token':22}{predicted.seconds * 1e3:>9.1f} ms   predicted: "
        f"{predicted.compute_seconds * 1e3:.1f} ms compute, "
        f"{predicted.wait_seconds * 1e3:.1f} ms waiting",
        f"{'physical limit':22}{limit * 1e3:>9.1f} ms   what doesn't fit the budget, at the full "
        "bandwidth of its link, or the compute",
    ]
    if not machine.measured:
        lines.append("The machine's figures are declared or defaults, not measured.")
    return "\n".join(lines)


def _quality_text(veto: Veto, plan: Plan) -> str:
    """Print the bound, what the plan was predicted to cost, and the floors by count."""
    quality = veto.to_json()
    floors = [floor for name, floor in veto.ledger.floors.items() if name in plan.placements]
    counts = ", ".join(f"{p} {floors.count(p)}" for p in Precision if p in floors)
    predicted = quality["predicted_nats"]
    lines = [
        f"{'epsilon':22}{quality['epsilon_nats']:>12.5f}   nats per token that may be lost",
        f"{'sum of bounds':22}{quality['bound_nats']:>12.5f}   predicted x "
        f"{quality['factor']:.3g}, what the veto adds up",
        f"{'KL':22}{predicted:>12.5f}   predicted",
        f"{'blocks by floor':22}{'':12}   {counts}",
        "Below 3 bits a measurement has to come first: attach(..., epsilon=, measure=).",
    ]
    return "\n".join(lines)


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
        "0.02 (nats per token) or ppl=1.02; needs calibrated --hints (default: no bound)",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--blocks", action="store_true", help="a row for each block")
    output.add_argument(
        "--json", type=Path, metavar="FILE", help="write the last line's JSON here as well"
    )
    return parser
