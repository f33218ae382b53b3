import random
from collections import deque
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lib.errors import InputError
from lib.tiering import Clock, EmulationSpec, TierSpec, attach
from lib.tiering.transfer.emulation import EmulatedTime, EmulatedTransport
from lib.tiering.transfer.transport import Unit
from lib.tiering.transfer.waiting import HostWaiter, Overshoot
from lib.vocabulary import Tier

pytestmark = pytest.mark.filterwarnings("ignore:flat hints")


def toy() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 8))


HINTS = {"0": "HBM", "2": "CPU", "3": "SSD"}
BLOCK_BYTES = (64 + 8) * 4


def test_a_use_is_charged_setup_plus_bytes_over_bandwidth_less_what_compute_hid() -> None:
    spec = EmulationSpec(
        specs={
            Tier.HBM: TierSpec("HBM", 1, 1000),
            Tier.CPU: TierSpec("CPU", 1e5, 1),
            Tier.SSD: TierSpec("SSD", 2e5, 0.5),
        }
    )
    with attach(model := toy(), HINTS, mode="emulated", emulation=spec) as runtime, torch.no_grad():
        for _ in range(3):
            model(torch.ones(1, 8))
        stats = runtime.stats()
        assert [stats.blocks[name].calls for name in HINTS] == [3, 3, 3]
        # The two links work at the same time, and while the model computes.
        assert 2 * 0.2 < runtime.virtual_seconds < 3 * (0.1 + 0.2)
        assert stats.bytes_moved == 3 * 2 * BLOCK_BYTES  # what lies in HBM isn't moved into it
        assert stats.wait_error is None
        runtime.reset_stats()
        assert runtime.virtual_seconds == 0.0


def test_a_first_transfer_is_charged_in_full() -> None:
    spec = EmulationSpec(
        specs={Tier.HBM: TierSpec("HBM", 0, 1000), Tier.SSD: TierSpec("SSD", 5e5, 1)}
    )
    with attach(
        model := nn.Linear(8, 8), {"weight": "SSD", "bias": "SSD"}, mode="emulated", emulation=spec
    ) as runtime:
        with torch.no_grad():
            model(torch.ones(1, 8))
        assert runtime.virtual_seconds == pytest.approx(0.5, rel=0.02)


def test_weights_in_hbm_cost_time_only_on_a_declared_machine() -> None:
    specs = {Tier.HBM: TierSpec("HBM", 1e5, 1)}
    for charge, seconds in ((True, 0.1), (False, 0.0)):
        spec = EmulationSpec(specs=specs, charge_hbm=charge)
        with attach(
            model := toy(), dict.fromkeys(HINTS, "HBM"), mode="emulated", emulation=spec
        ) as runtime:
            with torch.no_grad():
                model(torch.ones(1, 8))
            assert runtime.virtual_seconds == pytest.approx(3 * seconds, rel=0.02)


def test_outputs_are_those_of_the_model() -> None:
    model, inputs = toy(), torch.randn(4, 8)
    with torch.no_grad():
        expected = model(inputs)
        with attach(model, HINTS, mode="emulated"):
            assert torch.equal(model(inputs), expected)


def test_the_wall_clock_really_waits_and_reports_its_error() -> None:
    spec = EmulationSpec(
        specs={tier: TierSpec(str(tier), 4000, 1) for tier in (Tier.HBM, Tier.CPU, Tier.SSD)},
        clock=Clock.WALL,
    )
    with attach(model := toy(), HINTS, mode="emulated", emulation=spec) as runtime, torch.no_grad():
        model(torch.ones(1, 8))
        stats = runtime.stats()
    assert runtime.virtual_seconds == 0.0
    assert stats.transfer_seconds >= 0.9 * 3 * 4000e-6  # compute hid a little of them
    assert stats.wait_error is not None
    assert stats.wait_error["n"] == 3
    assert 0 <= stats.wait_error["mean_us"] <= stats.wait_error["max_us"]


def test_a_wait_is_never_too_short() -> None:
    waiter = HostWaiter()
    for seconds in (5e-6, 1e-4, 3e-3):
        waiter.wait(seconds)
    assert all(error >= 0 for error in waiter.errors_us())


@pytest.mark.parametrize("count", [1, 20, 5_000, 60_000])
def test_what_is_kept_of_waits_stays_small_and_right(count: int) -> None:
    dice = random.Random(1)
    errors = [dice.expovariate(1.0) for _ in range(count)]
    overshoot = Overshoot()
    for error in errors:
        overshoot.add(error)
    found = overshoot.summary()
    assert found is not None and len(overshoot.sample) <= 4_096
    assert found["n"] == count and found["max_us"] == max(errors)
    assert found["mean_us"] == pytest.approx(sum(errors) / count)
    exact = sorted(errors)[min(count - 1, int(0.95 * count))]
    assert found["p95_us"] == (exact if count <= 4_096 else pytest.approx(exact, rel=0.1))
    assert Overshoot().summary() is None


def grown(thing: Any, seen: set[int]) -> int:
    """Count the items of all lists, dicts, sets and deques below an object of ours."""
    if id(thing) in seen or isinstance(thing, type | nn.Module | torch.Tensor):
        return 0
    seen.add(id(thing))
    if isinstance(thing, dict):
        return len(thing) + sum(grown(item, seen) for item in thing.values())
    if isinstance(thing, list | tuple | set | frozenset | deque):
        return len(thing) + sum(grown(item, seen) for item in thing)
    if not type(thing).__module__.startswith(("lib.", "tierhints")):
        return 0
    slots = [name for cls in type(thing).__mro__ for name in getattr(cls, "__slots__", ())]
    parts = [getattr(thing, name, None) for name in slots]
    return grown(getattr(thing, "__dict__", {}), seen) + sum(grown(part, seen) for part in parts)


@pytest.mark.parametrize("clock", [Clock.WALL, Clock.VIRTUAL, None])
def test_a_runtime_holds_no_more_after_many_forwards(
    clock: Clock | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("lib.tiering.transfer.waiting._SAMPLE", 16)
    monkeypatch.setattr("lib.tiering.telemetry._TIMELINE_LIMIT", 16)
    monkeypatch.setattr("lib.tiering.transfer.transitions._KEPT", 4)
    model = toy()
    if clock is None:
        runtime = attach(model, HINTS, budget={"HBM": None, "SSD": None}, spill_dir=tmp_path)
    else:
        specs = {tier: TierSpec(str(tier), 1, 1000) for tier in (Tier.HBM, Tier.CPU, Tier.SSD)}
        emulation = EmulationSpec(specs=specs, clock=clock)
        runtime = attach(model, HINTS, mode="emulated", emulation=emulation)
    with runtime, torch.no_grad():
        sizes = []
        for _ in range(4):
            for _ in range(30):
                model(torch.ones(1, 8))
            for _ in range(30):
                model[2](torch.ones(1, 8))  # a part, by itself
                model[3].weight.sum()  # between two forwards
            sizes.append(grown(runtime, set()))
        # A sample of waits, of which a busy machine makes more or fewer, may still fill once.
        assert any(later <= sooner for sooner, later in pairwise(sizes)), sizes
        # A layer that resides is none by itself.
        assert runtime.stats().forwards == (120 if clock is None else 240)


def test_a_tier_without_a_spec_is_refused() -> None:
    with pytest.raises(InputError, match="tier OBJECT has no emulation spec"):
        attach(toy(), {**HINTS, "3": "OBJECT"}, mode="emulated")


def test_the_same_plan_can_be_asked_about_another_machine() -> None:
    slow, fast = (
        EmulationSpec(
            specs={tier: TierSpec(tier, setup, 1000) for tier in (Tier.CPU, Tier.SSD)},
            charge_hbm=False,
        )
        for setup in (1e5, 0)
    )
    with attach(model := toy(), HINTS, mode="emulated", emulation=slow) as runtime:
        seconds = []
        for spec in (slow, fast, slow):
            runtime.emulation = spec
            assert runtime.emulation is spec
            with torch.no_grad():
                model(torch.ones(1, 8))  # what was on its way keeps its time
                runtime.reset_stats()
                model(torch.ones(1, 8))
            seconds.append(runtime.virtual_seconds)
        assert seconds[1] < 0.01 < 0.09 < seconds[0]
        assert seconds[2] > 0.09
        with pytest.raises(InputError, match="clock is virtual since attach"):
            runtime.emulation = EmulationSpec(specs=slow.specs, clock=Clock.WALL)
        with pytest.raises(InputError, match="no emulation spec"):
            runtime.emulation = EmulationSpec(specs={Tier.OBJECT: TierSpec("S3", 0, 1)})
        assert runtime.emulation is slow


def test_real_mode_emulates_no_machine() -> None:
    with attach(toy(), budget={"HBM": None}) as runtime:
        assert runtime.emulation is None
        with pytest.raises(InputError, match="attach with mode='emulated'"):
            runtime.emulation = EmulationSpec()


def test_what_is_not_urgent_waits_for_all_that_is_and_can_be_withdrawn() -> None:
    now = [0.0]
    specs = {Tier.SSD: TierSpec("SSD", 1e6, 1e9)}  # a second each
    clock = EmulatedTime(EmulationSpec(specs=specs), torch.device("cpu"))
    clock.clock = lambda: now[0]
    transport = EmulatedTransport(clock)
    unit = Unit("group", 0, Tier.SSD, "key", 0, 1, 1)
    first, second, third = (transport.submit(unit, 0, urgent=False) for _ in range(3))
    now[0] = 0.5  # the first has begun
    urgent = transport.submit(unit, 0)
    assert urgent.due == pytest.approx(2.0)
    assert not transport.withdraw(first) and transport.withdraw(third)
    now[0] = 1.5
    assert transport.has_arrived(first) and not transport.has_arrived(urgent)
    transport.wait(second)
    assert clock.virtual_seconds == pytest.approx(1.5)  # until 3.0
    assert transport.take_link_seconds() == pytest.approx(3.0)
