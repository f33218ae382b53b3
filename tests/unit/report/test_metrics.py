"""What Prometheus reads of a runtime."""

import re
from typing import Any

import pytest
import torch
from prometheus_client import generate_latest
from tiny_models import tiny_gpt2, tiny_qwen_moe

from lib.errors import InputError
from lib.report.metrics import runtime_metrics
from lib.tiering import attach


def scraped(registry: Any) -> dict[str, float]:
    """Name with labels -> value."""
    lines = generate_latest(registry).decode().splitlines()
    return {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
        for line in lines
        if not line.startswith("#")
    }


def test_figures_are_the_runtime_s_at_each_scrape() -> None:
    model = tiny_gpt2().eval()
    with attach(model, budget={"HBM": "20KiB", "SSD": None}) as runtime, torch.no_grad():
        registry = runtime_metrics(runtime)
        before = scraped(registry)
        model(torch.arange(1, 9)[None])
        found, stats = scraped(registry), runtime.stats()
    assert before["tierhints_forwards_total"] == 0
    assert found["tierhints_forwards_total"] == 1
    assert found["tierhints_moved_bytes_total"] == stats.bytes_moved > 0
    assert found['tierhints_fast_memory_bytes{kind="limit"}'] == 20 * 1024
    assert found['tierhints_fast_memory_bytes{kind="used"}'] <= 20 * 1024
    assert found['tierhints_weight_bytes{tier="SSD"}'] == stats.bytes_per_tier["SSD"]
    states = {key: value for key, value in found.items() if key.startswith("tierhints_blocks")}
    assert sum(states.values()) == len(runtime.states())
    assert all(re.fullmatch(r'tierhints_blocks\{state="S[1-7]"\}', key) for key in states)
    assert not any(key.startswith("tierhints_expert") for key in found)


def test_experts_are_counted_by_how_they_were_found() -> None:
    model = tiny_qwen_moe().eval()
    with attach(model, budget={"HBM": "200KiB", "SSD": None}) as runtime, torch.no_grad():
        for _ in range(3):
            model(torch.arange(1, 3)[None])
        found, stats = scraped(runtime_metrics(runtime)), runtime.stats().experts
    assert stats is not None
    uses = [
        found[f'tierhints_expert_uses_total{{found="{each}"}}'] for each in ("resident", "read")
    ]
    assert uses == [stats.resident, stats.reads]
    assert found['tierhints_expert_uses_total{found="ahead"}'] == stats.useful
    assert sum(uses) + stats.useful == stats.uses


def test_without_prometheus_client_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib.extras.importlib.util.find_spec", lambda name: None)
    with attach(tiny_gpt2().eval(), budget={"HBM": "1MiB", "SSD": None}) as runtime:
        with pytest.raises(InputError, match=r"prometheus_client: pip install 'tierhints\[monitor"):
            runtime_metrics(runtime)
