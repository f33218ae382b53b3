"""From plan to plan: what each tier really holds, block by block on the way."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from calibrated_model import model, reference, text

from lib.errors import InputError, PlacementError
from lib.tiering import Runtime, attach
from lib.tiering.residency.held import HeldGroup
from lib.tiering.stores import DeviceStore
from lib.vocabulary import Tier

KIB = 2**10


def test_no_tier_holds_more_than_its_budget_on_the_way_from_plan_to_plan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = random.Random(0)
    full, tokens, network = reference(), text(), model()

    def budget() -> dict[str, int | None]:
        return {
            "HBM": generator.randrange(150, 600) * KIB,
            "CPU": generator.randrange(50, 300) * KIB,
            "SSD": generator.choice([None, generator.randrange(100, 500) * KIB]),
        }

    limits: dict[str, int | None] = budget()
    seen: list[dict[Tier, int]] = []
    refused = 0
    with attach(network, mode="emulated", budget={**limits, "HBM": 600 * KIB}) as runtime:

        def watched(move: Callable[..., None]) -> Callable[..., None]:
            def moved(self: HeldGroup, *args: Any, **options: Any) -> None:
                before = held(runtime)
                move(self, *args, **options)
                now = held(runtime)
                seen.append(now)
                for name, limit in limits.items():
                    tier = Tier(name)
                    assert limit is None or now[tier] <= max(limit, before[tier])

            return moved

        for name in ("send_off", "bring_in"):
            monkeypatch.setattr(HeldGroup, name, watched(getattr(HeldGroup, name)))
        for _ in range(40):
            limits = budget()
            try:
                runtime.budget = limits
            except (InputError, PlacementError) as error:
                refused += 1
                assert "smallest that works" in str(error) or "on its way" in str(error)
                continue
            assert all(
                limit is None or held(runtime)[Tier(n)] <= limit for n, limit in limits.items()
            )
            with torch.inference_mode():
                assert torch.equal(network(tokens).logits, full)
    assert len(seen) > 100 and refused < 30


def held(runtime: Runtime) -> dict[Tier, int]:
    """Measure what lies in each tier: resident blocks, and payloads in the stores."""
    residency = runtime._keeper.residency
    totals = dict.fromkeys(Tier, 0)
    for tier, store in residency._archive._stores.items():
        assert isinstance(store, DeviceStore)
        totals[tier] = store.used_bytes()
    totals[Tier.HBM] = residency.bytes_per_tier().get(Tier.HBM, 0)
    return totals
