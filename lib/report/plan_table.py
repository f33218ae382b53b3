"""A plan as text: where blocks are and what they take, what is predicted, what quality costs."""

from collections.abc import Iterable
from typing import Any

from ..machine import MachineProfile
from ..policy import BlockNeed, Plan
from ..tiering import Planned
from ..units import format_bytes
from ..vocabulary import Precision, Tier


def plan_sections(planned: Planned, document: dict[str, Any], *, every_block: bool) -> str:
    """Return the sections of a plan within a budget; ``document`` is its ``to_json``."""
    plan, machine = planned.plan, planned.machine
    sections = [
        _block_table(planned.needs, plan, machine, every_block=every_block),
        _summary(plan, machine, document["limit_ms_per_token"]),
    ]
    if document["quality"] is not None:
        sections.append(_quality_text(document["quality"]))
    return "\n\n".join(sections)


def _block_table(
    needs: Iterable[BlockNeed], plan: Plan, machine: MachineProfile, *, every_block: bool
) -> str:
    """Print blocks of a kind in one place as a row, or each block, with what one token moves."""
    rows: dict[tuple[str, ...], list[BlockNeed]] = {}
    for need in needs:
        placement = plan.placements[need.name]
        row = need.name if every_block else need.kind
        place = (placement.precision, placement.tier, placement.state)
        rows.setdefault((row, *map(str, place)), []).append(need)
    width = max([12, *(len(key[0]) for key in rows)])
    what = "block" if every_block else "kind"
    lines = [
        f"{what:{width}}  {'precision':9}  {'tier':6}  {'state':5}  {'blocks':>6}  {'bytes':>10}  "
        f"{'link/token':>10}  layers"
    ]
    tiers, kinds = list(map(str, Tier)), list(dict.fromkeys(key[0] for key in rows))
    ordered = sorted(rows, key=lambda key: (kinds.index(key[0]), tiers.index(key[2])))
    for key in [*rows] if every_block else ordered:
        row, precision, tier, state = key
        members = rows[key]
        held = sum(plan.placements[need.name].held_bytes for need in members)
        milliseconds = sum(_link_ms(need, plan, machine) for need in members)
        link = f"{milliseconds:7.1f} ms" if milliseconds else "-"
        layers = _ranges(need.layer for need in members)
        lines.append(
            f"{row:{width}}  {precision:9}  {tier:6}  {state:5}  {len(members):6}  "
            f"{format_bytes(held):>10}  {link:>10}  {layers}".rstrip()
        )
    return "\n".join(lines)


def _link_ms(need: BlockNeed, plan: Plan, machine: MachineProfile) -> float:
    """Return the milliseconds of its link that a block takes per token."""
    placement = plan.placements[need.name]
    if placement.tier is Tier.HBM:
        return 0.0
    spec = machine.tiers[placement.tier]
    if need.routed:  # as often as it is routed to
        return need.lookup_bytes / need.unit * spec.transfer_seconds(need.unit) * 1e3
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


def _summary(plan: Plan, machine: MachineProfile, limit_ms: float) -> str:
    predicted = plan.predicted
    lines = []
    for tier, num_bytes in plan.bytes_per_tier().items():
        given = plan.budget[tier]
        of = "no limit" if given is None else f"of {format_bytes(given)}"
        lines.append(f"{tier + ' weights':22}{format_bytes(num_bytes):>12}   {of}")
    slots = plan.num_slots * plan.slot_bytes
    cache = f"{'cache of experts':22}{format_bytes(plan.cache_bytes):>12}"
    lines += [
        f"{'slots':22}{format_bytes(slots):>12}   {plan.num_slots} of "
        f"{format_bytes(plan.slot_bytes)}",
        *([cache] if plan.cache_bytes else []),
        f"{'working memory':22}{format_bytes(plan.scratch_bytes):>12}",
        f"{'peak fast memory':22}{format_bytes(plan.fast_bytes):>12}   predicted",
        f"{'moved per token':22}{format_bytes(predicted.moved_bytes):>12}",
        f"{'time per token':22}{predicted.seconds * 1e3:>9.1f} ms   predicted: "
        f"{predicted.compute_seconds * 1e3:.1f} ms compute, "
        f"{predicted.wait_seconds * 1e3:.1f} ms waiting",
        f"{'physical limit':22}{limit_ms:>9.1f} ms   what doesn't fit the budget, at the full "
        "bandwidth of its link, or the compute",
    ]
    if not machine.measured:
        lines.append("The machine's figures are declared or defaults, not measured.")
    return "\n".join(lines)


def division_text(exact: dict[str, Any]) -> str:
    """Print how a budget is divided for exact output; of ``Division.to_json``."""
    precision = exact["precision"] or "within epsilon"
    how = "above, read as residuals" if exact["residuals"] else "above"
    known = exact["acceptance"]
    accepted = "unknown, 0.9 taken" if known is None else f"{known:.3f}, predicted by the hints"
    draft, full = (format_bytes(exact[f"{part}_bytes"]) for part in ("draft", "full"))
    return "\n".join(
        [
            f"{'draft':22}{draft:>12}   {precision}, {exact['draft_ms']:.1f} ms a token",
            f"{'full weights':22}{full:>12}   as {how}, {exact['pass_ms']:.1f} ms a pass",
            f"{'acceptance':22}{'':12}   {accepted}",
            f"{'window':22}{exact['window']:>12}   drafted tokens for a pass",
            f"{'exact output':22}{exact['tokens_per_s']:>12.1f}   tokens/s predicted",
        ]
    )


def _quality_text(quality: dict[str, Any]) -> str:
    """Print the bound, what the plan was predicted to cost, and the floors by count."""
    floors = [block["floor"] for block in quality["blocks"].values()]
    counts = ", ".join(f"{p} {floors.count(p)}" for p in Precision if p in floors)
    lines = [
        f"{'epsilon':22}{quality['epsilon_nats']:>12.5f}   nats per token that may be lost",
        f"{'sum of bounds':22}{quality['bound_nats']:>12.5f}   predicted x "
        f"{quality['factor']:.3g}, what the veto adds up",
        f"{'KL':22}{quality['predicted_nats']:>12.5f}   predicted",
        f"{'blocks by floor':22}{'':12}   {counts}",
        "Below 3 bits a measurement has to come first: attach(..., epsilon=, measure=).",
    ]
    return "\n".join(lines)
