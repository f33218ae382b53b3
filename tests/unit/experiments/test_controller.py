"""The experiments of the controller, on a model of a few thousand weights."""

from pathlib import Path

from lib.policy.control import Settings
from scripts.experiments.controller.dense import cycle_bytes, run_dense
from scripts.experiments.controller.pressure import run_pressure
from tests.tiny_models import tiny_gpt2


def test_pressure_is_survived_and_its_log_replays(tmp_path: Path) -> None:
    found = run_pressure(
        tiny_gpt2().eval(),
        seconds=1.5,
        period_seconds=0.5,
        new_tokens=4,
        settings=Settings(dwell_us=50_000, refill_us=100_000),
        spill_dir=tmp_path,
    )
    assert found["outputs_equal"] is True
    assert found["replay_identical"] is True
    assert found["changes"] >= 2
    for name in ("dwell_violations", "floors_crossed", "over_budget"):
        assert found[name] == 0
    assert 0 < found["transitions_per_block_max"] <= found["transitions_per_block_allowed"]


def test_a_cycle_is_as_good_as_its_bound_allows(tmp_path: Path) -> None:
    found = run_dense(tiny_gpt2().eval(), share=0.8, tokens=4, spill_dir=tmp_path)
    assert found["belady"]["bytes"] <= found["lru"]["bytes"]
    assert found["ours"]["bytes"] <= found["lru"]["bytes"]
    assert found["ours"]["fast_bytes"] <= found["budget"]["bytes"]


def test_a_cycle_that_does_not_fit_hits_nothing_under_lru() -> None:
    sizes = {name: 10 for name in "abcd"}
    assert cycle_bytes(sizes, 30, least_used=False) == 40
    assert cycle_bytes(sizes, 40, least_used=False) == 0
