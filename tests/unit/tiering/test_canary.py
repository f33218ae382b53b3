"""The canary: predictions that promised too much are found out in the running model, and mended."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated_model import (
    BUDGET,
    calibrated,
    measure_of,
    model,
    precisions,
    reference,
    text,
    too_hopeful,
)
from torch import Tensor
from transformers import GPT2LMHeadModel

from lib.errors import InputError, PlacementError
from lib.policy.audit import Rule
from lib.policy.veto import Measured
from lib.tiering import Runtime, attach, empty_weights
from lib.tiering.residency.held import HeldGroup
from lib.tiering.stores import FileStore
from lib.vocabulary import Precision, Tier, is_below

EPSILON = 0.01


def logits(network: GPT2LMHeadModel) -> Tensor:
    tokens = text()
    with torch.inference_mode():
        return network(tokens).logits.clone()


def least_budget() -> int:
    """The fast memory that fits neither the resident nor the most precise model."""
    with attach(model(), too_hopeful(), budget=BUDGET, epsilon=EPSILON) as runtime:
        return runtime.plan.fast_bytes - 20_000


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model().save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.mark.parametrize("from_checkpoint", [False, True])
@pytest.mark.parametrize("tight", [False, True])
def test_hints_that_promise_too_much_are_found_out_and_mended(
    from_checkpoint: bool, tight: bool, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = reference()
    budget = {"HBM": least_budget(), "SSD": None} if tight else BUDGET
    network, arguments = model(), dict[str, Any]()
    if from_checkpoint:
        network = fresh_model()
        arguments["weights"] = saved
    measure = measure_of(full, network)
    with attach(
        network, too_hopeful(), budget=budget, epsilon=EPSILON, spill_dir=tmp_path, **arguments
    ) as runtime:
        low, promised = precisions(runtime), runtime.veto.predicted_nats
        assert promised is not None and measure().kl_nats > EPSILON > promised
        assert tight == (Tier.SSD in runtime.plan.bytes_per_tier())
        held = watch_fast_memory(runtime, monkeypatch)
        record = runtime.check_quality(measure)
        assert record.accepted
        assert runtime.veto.num_raised > 0
        assert {r.broken for r in runtime.audit.rejections} == {Rule.MEASURED}
        high = precisions(runtime)
        assert high != low
        assert not any(is_below(high[name], low[name]) for name in low)
        assert measure().kl_nats <= EPSILON
        limit = runtime.budget["HBM"]
        assert held and limit is not None
        assert max(held) <= limit >= runtime.stats().peak_resident_bytes
        found, plan = logits(network), runtime.plan
        document = runtime.veto.to_json()
        assert document["bound_nats"] <= EPSILON
    if not from_checkpoint:
        assert torch.equal(logits(network), full)
    fresh = fresh_model() if from_checkpoint else network
    with attach(fresh, budget=budget, precision=high, spill_dir=tmp_path, **arguments) as runtime:
        assert places(runtime.plan) == places(plan)
        assert torch.equal(logits(fresh), found)


def fresh_model() -> GPT2LMHeadModel:
    with empty_weights():
        return GPT2LMHeadModel(model().config).eval()


def places(plan: Any) -> dict[str, tuple[Tier, Precision]]:
    return {name: (place.tier, place.precision) for name, place in plan.placements.items()}


def watch_fast_memory(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Measure the weights in fast memory after each block that moves."""
    held: list[int] = []

    def watched(move: Callable[..., None]) -> Callable[..., None]:
        def moved(self: HeldGroup, *args: Any, **options: Any) -> None:
            move(self, *args, **options)
            held.append(runtime._keeper.residency.resident_bytes())

        return moved

    for name in ("let_go", "send_off", "bring_in"):
        monkeypatch.setattr(HeldGroup, name, watched(getattr(HeldGroup, name)))
    return held


def test_a_budget_without_room_for_the_raised_floors_stops_the_model(
    saved: Path, tmp_path: Path
) -> None:
    full, network = reference(), fresh_model()
    arguments = {"weights": saved, "spill_dir": tmp_path}
    with attach(
        network, too_hopeful(), budget={"HBM": "1GiB"}, epsilon=EPSILON, **arguments
    ) as runtime:
        size = runtime.plan.fast_bytes
        runtime.budget = {"HBM": size}
        low = precisions(runtime)
        with pytest.raises(PlacementError, match="the smallest that works is HBM=.*runtime.budget"):
            runtime.check_quality(measure_of(full, network))
        for _ in range(2):
            with pytest.raises(PlacementError, match=r"above epsilon 0.01 .* set a larger"):
                logits(network)
        with pytest.raises(InputError, match="too small"):
            runtime.budget = {"HBM": size}
        runtime.budget = {"HBM": "1GiB"}
        assert any(is_below(low[name], p) for name, p in precisions(runtime).items())
        runtime.check_quality(measure_of(full, network))
        assert measure_of(full, network)().kl_nats <= EPSILON


def test_originals_that_are_gone_stop_the_model_and_nothing_wrong_is_computed(
    tmp_path: Path,
) -> None:
    full, network = reference(), fresh_copy()
    runtime = attach(network, too_hopeful(), budget=BUDGET, epsilon=EPSILON, spill_dir=tmp_path)
    measure = measure_of(full, network)
    assert measure().kl_nats > EPSILON
    for path in tmp_path.glob("*.block"):
        path.write_bytes(b"")
    runtime._keeper.residency._archive._stores[Tier.SSD]._files.clear()  # type: ignore[attr-defined]
    with pytest.raises(PlacementError, match="above epsilon 0.01 .* payload"):
        runtime.check_quality(measure)
    with pytest.raises(PlacementError):
        logits(network)
    with pytest.raises(PlacementError, match="could not be restored"):
        runtime.detach()


def test_moves_that_fail_go_back_and_the_model_is_given_back_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, network = reference(), fresh_copy()
    runtime = attach(network, too_hopeful(), budget=BUDGET, epsilon=EPSILON, spill_dir=tmp_path)
    put, calls = FileStore.put, []

    def fail(self: FileStore, key: str, num_bytes: int, parts: Any) -> None:
        calls.append(key)
        if len(calls) == 3:
            raise PlacementError("the disk is full")
        put(self, key, num_bytes, parts)

    low = runtime.plan
    with monkeypatch.context() as patch:
        patch.setattr(FileStore, "put", fail)
        with pytest.raises(PlacementError, match="above epsilon 0.01 .* the disk is full"):
            runtime.check_quality(measure_of(full, network))
    assert runtime.plan == low
    with pytest.raises(PlacementError, match="above epsilon"):
        logits(network)
    runtime.budget = BUDGET  # there is room again
    assert runtime.check_quality(measure_of(full, network)).accepted
    runtime.detach()
    assert torch.equal(logits(network), full)


def fresh_copy() -> GPT2LMHeadModel:
    network = GPT2LMHeadModel(model().config).eval()
    network.load_state_dict(model().state_dict())
    return network


def test_a_measurement_that_nothing_satisfies_ends_with_the_full_model(tmp_path: Path) -> None:
    full, network = reference(), fresh_copy()
    with attach(
        network, calibrated(), budget=BUDGET, epsilon=EPSILON, spill_dir=tmp_path
    ) as runtime:
        with pytest.raises(PlacementError, match="every block is lossless"):
            runtime.check_quality(lambda: Measured(kl_nats=0.03, upper_nats=0.04))
        assert set(precisions(runtime).values()) == {Precision.FP32}
        assert torch.equal(logits(network), full)
        assert network.state_dict().keys() == model().state_dict().keys()
        runtime.budget = {"HBM": "300KiB", "SSD": None}
        assert torch.equal(logits(network), full)
    assert torch.equal(logits(network), full)


def test_floors_raised_under_a_limit_for_a_while_stay_raised(tmp_path: Path) -> None:
    full, network = reference(), fresh_copy()
    least = least_budget()
    with attach(
        network, too_hopeful(), budget=BUDGET, epsilon=EPSILON, spill_dir=tmp_path
    ) as runtime:
        with runtime.limited({"HBM": least, "SSD": None}):
            runtime.check_quality(measure_of(full, network))
            high = precisions(runtime)
        assert runtime.budget == {"HBM": 2**30, "SSD": None}
        assert precisions(runtime) == high
        assert runtime.check_quality(measure_of(full, network)).accepted


def test_a_budget_that_the_raised_floors_outgrew_meanwhile_is_not_gone_back_to(
    saved: Path, tmp_path: Path
) -> None:
    full, network = reference(), fresh_model()
    measured = iter([math.nan, 0.0])

    def measure() -> Measured:
        nats = next(measured)
        return Measured(kl_nats=nats, upper_nats=nats)

    arguments = {"weights": saved, "spill_dir": tmp_path}
    with attach(
        network, too_hopeful(), budget={"HBM": "1GiB"}, epsilon=EPSILON, **arguments
    ) as runtime:
        runtime.budget = {"HBM": runtime.plan.fast_bytes}
        with (
            pytest.raises(PlacementError, match="set a larger runtime.budget"),
            runtime.limited({"HBM": "1GiB"}),
        ):
            runtime.check_quality(measure)
        with pytest.raises(PlacementError, match="doesn't hold the blocks"):
            logits(network)
        runtime.budget = {"HBM": "1GiB"}
        assert torch.equal(logits(network), full)


def test_emulated_tiers_are_measured_and_mended_too() -> None:
    full, network = reference(), fresh_copy()
    with attach(network, too_hopeful(), mode="emulated", epsilon=EPSILON) as runtime:
        assert runtime.check_quality(measure_of(full, network)).accepted
        assert runtime.veto.num_raised > 0
    assert torch.equal(logits(network), full)


def test_a_limited_disk_holds_no_more_than_its_budget() -> None:
    full, network = reference(), fresh_copy()
    mended = 0
    for size in ("440KiB", "500KiB", "600KiB"):
        budget = {"HBM": least_budget() + 50_000, "SSD": size}
        with attach(network, too_hopeful(), budget=budget, epsilon=EPSILON) as runtime:
            assert 0 < stored_bytes(runtime) <= runtime.plan.budget[Tier.SSD]  # type: ignore[operator]
            try:
                runtime.check_quality(measure_of(full, network))
            except PlacementError as error:
                assert "set a larger runtime.budget" in str(error)
            else:
                mended += 1
            assert 0 < stored_bytes(runtime) <= runtime.plan.budget[Tier.SSD]  # type: ignore[operator]
    assert mended
    assert torch.equal(logits(network), full)


def stored_bytes(runtime: Runtime) -> int:
    """Add up the files that a temporary folder holds, less their headers."""
    store = runtime._keeper.residency._archive._stores[Tier.SSD]
    assert isinstance(store, FileStore)
    return sum(store.num_bytes(path.stem) for path in store.folder.glob("*.block"))
