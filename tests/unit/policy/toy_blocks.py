"""Needs, machines and an exhaustive search, small enough to check a plan against."""

from collections.abc import Sequence
from itertools import product

from hypothesis import strategies as st

from lib.machine import MachineProfile, TierSpec
from lib.policy.plan import BlockNeed, Step
from lib.policy.planner.problem import Problem
from lib.policy.timeline import Transfer, simulate
from lib.vocabulary import Precision, Tier

MIB = 2**20


def make_machine(
    *, setup_us: float = 100.0, ssd: float = 1.0, cpu: float = 10.0, **capacities: int
) -> MachineProfile:
    """A machine with HBM, CPU and SSD; bandwidths in GB/s, capacities by tier."""
    return MachineProfile(
        name="toy",
        tiers={
            Tier.HBM: TierSpec("HBM", 0.0, 100.0),
            Tier.CPU: TierSpec("CPU", setup_us / 10, cpu),
            Tier.SSD: TierSpec("SSD", setup_us, ssd),
        },
        capacity_bytes={Tier(name): size for name, size in capacities.items()},
    )


def make_need(name: str, num_bytes: int, **fields: object) -> BlockNeed:
    """A lossless block whose payload has the bytes of the block."""
    values: dict[str, object] = {
        "kind": "mlp",
        "layer": None,
        "precision": Precision.FP32,
        "resident_bytes": num_bytes,
        "stored_bytes": num_bytes,
        **fields,
    }
    return BlockNeed(name=name, **values)  # type: ignore[arg-type]


def make_layers(
    count: int, *, attention_mib: int = 4, mlp_mib: int = 8, compute_seconds: float = 1e-3
) -> list[BlockNeed]:
    """Layers of an attention and an MLP block."""
    return [
        make_need(
            f"h.{layer}.{kind}", size * MIB, kind=kind, layer=layer, compute_seconds=compute_seconds
        )
        for layer in range(count)
        for kind, size in (("attn", attention_mib), ("mlp", mlp_mib))
    ]


@st.composite
def models(draw: st.DrawFn, *, max_layers: int = 4) -> list[BlockNeed]:
    """A tied embedding in shards, or none, and layers of two blocks each."""
    needs = []
    if draw(st.booleans()):
        shard = draw(st.sampled_from([1, 2, 4]))
        needs.append(
            make_need(
                "embedding",
                8 * MIB,
                unit_bytes=(shard * MIB,) * (8 // shard),
                uses=draw(st.sampled_from([1, 2])),
                lookup_bytes=2**18,
                compute_seconds=draw(st.sampled_from([0.0, 3e-3])),
            )
        )
    sizes = draw(st.sampled_from([(4, 8), (3, 7), (5, 5), (1, 9)]))
    computes = draw(st.tuples(*[st.sampled_from([0.0, 1e-3, 5e-3, 2e-2])] * 2))
    for layer in range(draw(st.integers(1, max_layers))):
        for kind, size, seconds in zip("am", sizes, computes, strict=True):
            needs.append(make_need(f"{kind}{layer}", size * MIB, compute_seconds=seconds))
    return needs


@st.composite
def machines(draw: st.DrawFn) -> MachineProfile:
    """From links far slower to links far faster than the toy models' compute."""
    return make_machine(
        setup_us=draw(st.sampled_from([0.0, 50.0, 500.0])),
        ssd=draw(st.sampled_from([0.5, 1.0, 5.0, 50.0])),
        cpu=draw(st.sampled_from([3.0, 60.0])),
    )


def best_seconds(
    needs: Sequence[BlockNeed], schedule: Sequence[Step], fast: int, machine: MachineProfile
) -> float:
    """Try every resident set with every number of slots, and the SSD below; feasible budgets."""
    problem = Problem(needs, schedule, {Tier.SSD: None}, machine, 0)
    groups = {name: group for group in problem.groups for name in group.members}
    best = float("inf")
    for kept in product((False, True), repeat=len(needs)):
        resident = sum(need.resident_bytes for need, keep in zip(needs, kept, strict=True) if keep)
        streamed = [groups[need.name] for need, keep in zip(needs, kept, strict=True) if not keep]
        slot = int(max((group.smallest_slot for group in streamed), default=0))
        transfers = {
            need.name: Transfer(Tier.SSD, groups[need.name].units, need.lookup_bytes)
            for need, keep in zip(needs, kept, strict=True)
            if not keep
        }
        for num_slots in (1, 2, 3) if slot else (0,):
            if resident + num_slots * slot <= fast:
                result = simulate(problem.uses, transfers, machine.tiers, num_slots)
                best = min(best, result.seconds)
    return best
