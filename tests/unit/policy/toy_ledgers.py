"""Ledgers, and plans of their blocks, without a model."""

from collections.abc import Mapping
from dataclasses import replace

from toy_blocks import MIB, make_machine, make_need

from lib.policy import BlockNeed, Placement, Plan, definition_schedule, make_plan, placed_state
from lib.precision.floors import Curve, Ledger
from lib.vocabulary import Precision, Tier

BITS = {"fp32": 32.0, "int8": 8.0, "int6": 6.5, "int5": 5.5, "int4": 4.5, "int3": 3.5, "int2": 2.5}
LADDER = [Precision(name) for name in BITS]
Budget = Mapping[Tier, int | None]
HBM_AND_DISK: Budget = {Tier.HBM: None, Tier.SSD: None}


def make_curve(scale: float, *, mib: int = 8, lowest: Precision | None = None) -> Curve:
    """A block of ``mib`` MiB in float32 whose KL grows by 4.5 a bit, from ``scale`` at 8 bits."""
    return Curve(
        native=Precision.FP32,
        kl_nats={p: scale * 4.5 ** (8 - BITS[p]) for p in LADDER[1:]},
        cost={p: mib * MIB * BITS[p] / 32 for p in LADDER},
        lowest=lowest,
    )


def plan_at(
    ledger: Ledger, precisions: Mapping[str, Precision], budget: Budget = HBM_AND_DISK
) -> Plan:
    needs: list[BlockNeed] = []
    for name, curve in ledger.curves.items():
        size = int(curve.cost[precisions[name]])
        needs.append(make_need(name, size, precision=precisions[name], compute_seconds=1e-3))
    return make_plan(needs, definition_schedule(needs), budget, make_machine(), 0)


def with_block(plan: Plan, ledger: Ledger, name: str, precision: Precision, tier: Tier) -> Plan:
    """Ask for another place of a single block."""
    size = int(ledger.curves[name].cost[precision])
    place = Placement(
        tier=tier,
        precision=precision,
        state=placed_state(tier, precision, computed_as_is=False),
        reason="asked for",
        resident_bytes=size if tier is Tier.HBM else 0,
        stored_bytes=size,
        unit_bytes=() if tier is Tier.HBM else (size,),
    )
    return replace(plan, placements={**plan.placements, name: place})
