"""How much memory there is: RAM, and the memory limit of the cgroup, version 1 and 2."""

import re
from collections.abc import Iterator
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_PROC = Path("/proc")


def total_memory() -> int:
    """Return the bytes of RAM; 0 where the system doesn't tell."""
    return _meminfo().get("MemTotal", 0)


def memory_limit() -> int | None:
    """Return the smallest memory limit of this process's cgroups; None where none is below RAM."""
    total = total_memory()
    return min((limit for limit, _ in _cgroups() if limit < total), default=None)


def available_memory() -> int:
    """Return the bytes that this process can still take: what RAM and its cgroups have left.

    The page cache of a cgroup counts as left, since the kernel drops it first.
    """
    available = _meminfo().get("MemAvailable", 0)
    return max(min([available, *(limit - used for limit, used in _cgroups())]), 0)


def _meminfo() -> dict[str, int]:
    return {
        name: int(kib) * 1024
        for name, kib in re.findall(
            r"^(\w+):\s+(\d+) kB", read_system_file(_PROC / "meminfo"), re.M
        )
    }


def _cgroups() -> Iterator[tuple[int, int]]:
    """Yield (limit, bytes in use less page cache) of the limited cgroups that hold this process."""
    for line in read_system_file(_PROC / "self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, prefix = _CGROUPS, ""
            limit_file, usage_file = "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            mount, prefix = _CGROUPS / "memory", "total_"
            limit_file, usage_file = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = mount / path.lstrip("/")
        # In a container the path may be the host's, and its limit at the mount itself.
        for folder in {group, *group.parents, mount}:
            limit, usage = (
                read_system_file(folder / limit_file).strip(),
                read_system_file(folder / usage_file).strip(),
            )
            if limit.isdigit() and usage.isdigit():
                cache = re.findall(
                    rf"^{prefix}(?:in)?active_file (\d+)$",
                    read_system_file(folder / "memory.stat"),
                    re.M,
                )
                yield int(limit), int(usage) - sum(map(int, cache))


def read_system_file(path: Path) -> str:
    """Return a file's text, "" where it is not there: what Linux tells differs by machine."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
