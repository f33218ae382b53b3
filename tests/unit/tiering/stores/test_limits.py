from pathlib import Path

import pytest

from lib.tiering.stores import (
    limits,
)


@pytest.mark.parametrize("version", [1, 2])
def test_the_cgroup_limit_bounds_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 8000 kB\nMemFree: 1 kB\nMemAvailable:    6000 kB\n")
    mount, prefix, names = groups, "", ("memory.max", "memory.current")
    (proc / "self/cgroup").write_text("0::/a/b\n")
    if version == 1:
        mount, prefix = groups / "memory", "total_"
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        (proc / "self/cgroup").write_text("9:cpu:/\n4:memory:/a/b\n0::/\n")
    (mount / "a/b").mkdir(parents=True)
    (mount / "a" / names[0]).write_text("4096000\n")
    (mount / "a" / names[1]).write_text("3000000\n")
    (mount / "a/memory.stat").write_text(
        f"{prefix}inactive_file 1000000\n{prefix}active_file 500000\nworkingset 7\n"
    )
    (mount / "a/b" / names[0]).write_text("max\n")
    (mount / "a/b" / names[1]).write_text("2000000\n")
    monkeypatch.setattr(limits, "_PROC", proc)
    monkeypatch.setattr(limits, "_CGROUPS", groups)
    assert limits.total_memory() == 8000 * 1024
    assert limits.memory_limit() == 4096000
    assert limits.available_memory() == 4096000 - 3000000 + 1500000
    (mount / "a" / names[0]).unlink()
    assert limits.memory_limit() is None
    assert limits.available_memory() == 6000 * 1024
