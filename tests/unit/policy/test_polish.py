from toy_blocks import MIB, make_layers, make_machine, make_need

from lib.policy.plan import definition_schedule
from lib.policy.planner.polish import exchanges
from lib.policy.planner.problem import Problem
from lib.vocabulary import Tier


def test_exchanges_keep_within_every_tier_and_slot() -> None:
    needs = [*make_layers(3), make_need("large", 20 * MIB), make_need("gate", 1, must_reside=True)]
    limits = {Tier.CPU: 16 * MIB, Tier.SSD: None}
    problem = Problem(needs, definition_schedule(needs), limits, make_machine(), 0)
    tiers = {need.name: Tier.HBM for need in needs}
    tiers |= {"h.0.mlp": Tier.CPU, "h.1.mlp": Tier.SSD, "h.2.attn": Tier.CPU}
    size = {need.name: need.resident_bytes for need in needs}
    found = list(exchanges(problem, tiers, slot_bytes=8 * MIB, space=MIB))
    assert found
    assert tiers not in found
    before = sum(size[name] for name, tier in tiers.items() if tier is Tier.HBM)
    for other in found:
        assert other["large"] is other["gate"] is Tier.HBM
        resident = sum(size[name] for name, tier in other.items() if tier is Tier.HBM)
        assert resident <= before + MIB
        assert sum(size[name] for name, tier in other.items() if tier is Tier.CPU) <= 16 * MIB
    assert {**tiers, "h.0.mlp": Tier.HBM, "h.2.mlp": Tier.CPU} in found
    assert {**tiers, "h.1.attn": Tier.CPU} in found
