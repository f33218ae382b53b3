"""What the controller sees of the runtime and of the system."""

import time
from pathlib import Path

import pytest
import torch

from lib.policy.control import Settings
from lib.tiering import attach
from lib.tiering.control.observe import Observer, SystemMemory, read_memory
from tests.tiny_models import tiny_gpt2, tiny_qwen_moe
from tests.unit.tiering.expert_budgets import budget_for

CPU = torch.device("cpu")
GIB = 2**30
IDS = torch.arange(1, 9)[None]


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MACHINE = {
    "proc/meminfo": f"MemTotal: {8 * 2**20} kB\nMemAvailable:  {6 * 2**20} kB\n",
    "proc/pressure/memory": "some avg10=12.50 avg60=1.00 avg300=0.00 total=9\nfull avg10=0.00\n",
}


def test_the_machine_is_what_there_is_without_a_control_group(tmp_path: Path) -> None:
    found = read_memory(CPU, write(tmp_path, MACHINE))
    assert found == SystemMemory(
        source="machine", free_bytes=6 * GIB, limit_bytes=8 * GIB, waited_share=0.125
    )
    assert read_memory(CPU, tmp_path / "nowhere") is None


@pytest.mark.parametrize("path", ["/a/b", "/not/mounted/here"])
def test_a_group_of_version_2(tmp_path: Path, path: str) -> None:
    folder = "sys/fs/cgroup/a/b" if path == "/a/b" else "sys/fs/cgroup"
    group = {
        "proc/self/cgroup": f"0::{path}\n",
        f"{folder}/memory.max": f"{4 * GIB}\n",
        f"{folder}/memory.current": f"{3 * GIB}\n",
        f"{folder}/memory.stat": f"anon 5\ninactive_file {GIB}\n",
    }
    found = read_memory(CPU, write(tmp_path, MACHINE | group))
    assert found is not None
    assert (found.source, found.free_bytes) == ("control group v2", 2 * GIB)


def test_a_group_of_version_1_and_one_without_a_limit(tmp_path: Path) -> None:
    folder = "sys/fs/cgroup/memory/job"
    group = {
        "proc/self/cgroup": "3:cpu:/\n4:memory:/job\n0::/\n",
        f"{folder}/memory.limit_in_bytes": f"{4 * GIB}\n",
        f"{folder}/memory.usage_in_bytes": f"{4 * GIB}\n",
        f"{folder}/memory.stat": f"inactive_file 0\ntotal_inactive_file {GIB}\n",
    }
    root = write(tmp_path, MACHINE | group)
    found = read_memory(CPU, root)
    assert found is not None
    assert (found.source, found.free_bytes) == ("control group v1", GIB)
    write(root, {f"{folder}/memory.limit_in_bytes": "9223372036854771712\n"})
    found = read_memory(CPU, root)
    assert found is not None and found.source == "machine"


def test_a_sample_says_what_a_streaming_model_did(tmp_path: Path) -> None:
    model = tiny_gpt2().eval()
    with attach(model, budget={"HBM": "20KiB", "SSD": None}, spill_dir=tmp_path) as runtime:
        control = runtime.control()
        observer = control.observer
        observer.look(time.perf_counter())
        with torch.no_grad():
            model(IDS)
            model(IDS)
        sample = observer.look(time.perf_counter())
        assert sample.forwards == 2
        assert sample.bytes_moved > 0 < sample.waited_seconds
        assert sample.hit_share is not None and 0 <= sample.hit_share < 1
        assert {name for name, _ in sample.waited_for} <= {block for block in runtime.states()}
        runtime.reset_stats()
        assert observer.look(time.perf_counter()).bytes_moved == 0


def test_a_reserve_of_the_system_is_kept_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = [2**40]
    monkeypatch.setattr(
        "lib.tiering.control.observe.read_memory",
        lambda device: SystemMemory(source="test", free_bytes=free[0], limit_bytes=2**40),
    )
    monkeypatch.setattr("lib.tiering.control.watcher._SAMPLE_SECONDS", 0.02)
    model = tiny_gpt2().eval()
    with attach(model, budget={"HBM": "1MiB", "SSD": None}, spill_dir=tmp_path) as runtime:
        control = runtime.control(reserve="1GiB", settings=Settings(dwell_us=1, refill_us=1))
        before = runtime.plan.fast_bytes

        def wait_until_fast_bytes(holds: bool) -> None:
            deadline = time.monotonic() + 30
            while (runtime.plan.fast_bytes < before) is not holds:
                assert time.monotonic() < deadline
                time.sleep(0.01)

        free[0] = 2**30 - 10_000
        wait_until_fast_bytes(True)
        assert runtime.plan.fast_bytes >= control.controller.floor_bytes
        free[0] = 2**40
        wait_until_fast_bytes(False)


def test_hits_of_experts_are_apart_from_those_of_other_blocks(tmp_path: Path) -> None:
    model = tiny_qwen_moe().eval()
    budget = budget_for(model, 0.4)
    with attach(model, budget=budget, spill_dir=tmp_path) as runtime, torch.no_grad():
        model(IDS[:, :1])
        runtime.reset_stats()
        observer = Observer(runtime._keeper, now=0.0)
        for _ in range(2):
            model(IDS[:, :1])
        sample, stats = observer.look(1.0), runtime.stats().experts
    assert stats is not None
    assert sample.hit_share == 1.0  # what is no expert resides
    assert (sample.expert_uses, sample.forwards) == (stats.uses, 2)
    assert sample.experts_resident == stats.resident
    assert stats.resident <= sample.experts_ready == stats.ready <= stats.uses
