"""What the controller can see: what the runtime did since it last looked, and the system's memory.

The runtime's figures are its own accounting, exact and at once. Those of the system are hints: on
Linux the memory of the process's control group (v1 and v2) or of the machine, and the share of time
in which tasks waited for memory (PSI, averaged over ten seconds). Everything is bounded.
"""

import contextlib
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..keeper import PlanKeeper

_KEPT_SAMPLES = 600
_WORST = 5
"""Blocks that a sample names, those that were waited for the longest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemMemory:
    """What is free where the weights are, and where that was read. ``waited_share`` in [0, 1]: of
    the last ten seconds, in which some task waited for memory; None: not known.
    """

    source: str
    free_bytes: int
    limit_bytes: int
    waited_share: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What happened between two looks. Seconds are of the runtime's telemetry: on a GPU they are
    known later. ``queue_depth``: groups on their way; ``hit_share``: of the weight bytes that
    forwards used, those that were resident, without experts that come by routing. Of these there
    are the uses in decoding, and those that were ``resident`` or at least ``ready``.
    """

    at_seconds: float
    seconds: float
    forwards: int
    bytes_moved: int
    waited_seconds: float
    compute_seconds: float
    queue_depth: int
    resident_bytes: int
    hit_share: float | None
    expert_uses: int
    experts_resident: int
    experts_ready: int
    waited_for: tuple[tuple[str, float], ...]
    system: SystemMemory | None


class Observer:
    """Looks at a runtime now and then; keeps the latest samples."""

    def __init__(self, keeper: PlanKeeper, now: float) -> None:
        self.samples: deque[Sample] = deque(maxlen=_KEPT_SAMPLES)
        self._keeper = keeper
        self._looked_at = self._began_at = now
        self._before = self._totals()

    def look(self, now: float) -> Sample:
        """Take a sample of what happened since the last one."""
        keeper = self._keeper
        totals, before = self._totals(), self._before
        self._before = totals

        def since(what: str) -> float:
            gone: float = totals[what] - before[what]
            return gone if gone >= 0 else float(totals[what])  # the statistics were begun anew

        forwards, moved = int(since("forwards")), int(since("bytes_moved"))
        routed = self._routed
        used = forwards * sum(
            payload.data_bytes for name, payload in keeper.payloads.items() if name not in routed
        )
        waits = {
            name: seconds - before["blocks"].get(name, 0.0)
            for name, seconds in totals["blocks"].items()
        }
        worst = sorted(waits.items(), key=lambda item: -item[1])[:_WORST]
        sample = Sample(
            at_seconds=now - self._began_at,
            seconds=now - self._looked_at,
            forwards=forwards,
            bytes_moved=moved,
            waited_seconds=since("waited_seconds"),
            compute_seconds=since("compute_seconds"),
            queue_depth=len(
                keeper.memory.prefetcher.in_flight | keeper.residency.experts.in_flight
            ),
            resident_bytes=keeper.recorder.resident_bytes,
            hit_share=max(1 - since("others_moved") / used, 0.0) if used else None,
            expert_uses=int(since("expert_uses")),
            experts_resident=int(since("experts_resident")),
            experts_ready=int(since("experts_ready")),
            waited_for=tuple((name, seconds) for name, seconds in worst if seconds > 0),
            system=read_memory(keeper.memory.device),
        )
        self._looked_at = now
        self.samples.append(sample)
        return sample

    @property
    def _routed(self) -> set[str]:
        """The experts that come by routing."""
        groups = self._keeper.residency.groups
        return {name for name, group in groups.items() if group.is_routed}

    def _totals(self) -> dict[str, Any]:
        recorder, routed = self._keeper.recorder, self._routed
        experts = self._keeper.forwards.lookahead.stats()
        blocks = list(recorder.blocks.items())
        return {
            "forwards": recorder.forwards,
            "bytes_moved": sum(block.bytes_moved for _, block in blocks),
            "others_moved": sum(each.bytes_moved for name, each in blocks if name not in routed),
            "expert_uses": experts.uses if experts is not None else 0,
            "experts_resident": experts.resident if experts is not None else 0,
            "experts_ready": experts.ready if experts is not None else 0,
            "waited_seconds": sum(block.transfer_seconds for _, block in blocks),
            "compute_seconds": sum(block.compute_seconds for _, block in blocks),
            "blocks": {name: block.transfer_seconds for name, block in blocks if block.bytes_moved},
        }


def sample_to_json(sample: Sample) -> dict[str, Any]:
    """Return a sample in plain JSON types."""
    return asdict(sample)


def read_memory(device: torch.device, root: Path = Path("/")) -> SystemMemory | None:
    """Return what is free on an accelerator, or in the machine's memory; None: nothing says so.

    ``root``: the folder below which ``proc`` and ``sys`` are.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return SystemMemory(source=str(device), free_bytes=free, limit_bytes=total)
    found = [each for each in (_read_machine(root), *_read_groups(root)) if each is not None]
    least = min(found, key=lambda each: each.free_bytes, default=None)
    if least is None:
        return None
    return SystemMemory(
        source=least.source,
        free_bytes=least.free_bytes,
        limit_bytes=least.limit_bytes,
        waited_share=_read_pressure(root),
    )


def _read_machine(root: Path) -> SystemMemory | None:
    fields = dict(_read_pairs(root / "proc/meminfo", ":"))
    if not {"MemAvailable", "MemTotal"} <= fields.keys():
        return None
    free, total = (int(fields[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    return SystemMemory(source="machine", free_bytes=free, limit_bytes=total)


def _read_groups(root: Path) -> Iterator[SystemMemory | None]:
    """Yield what control groups allow: the process's own, and, where a container shows that one as
    the root of its hierarchy, the root.
    """
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        version = "v2" if controllers == "" else "v1"
        for folder in (top / path.lstrip("/"), top):
            yield _read_group(folder, *names, source=f"control group {version}")


def _read_group(
    folder: Path, limit: str, usage: str, cache: str, *, source: str
) -> SystemMemory | None:
    """Read one group: what it may take, and takes without what can be dropped at once."""
    try:
        allowed = (folder / limit).read_text().strip()
        used = int((folder / usage).read_text())
    except (OSError, ValueError):
        return None
    if not allowed.isdigit() or int(allowed) >= 2**60:  # "max", or as v1 writes no limit
        return None
    stat = dict(_read_pairs(folder / "memory.stat", " "))
    working = used - int(stat.get(cache, "0"))
    free = max(int(allowed) - working, 0)
    return SystemMemory(source=source, free_bytes=free, limit_bytes=int(allowed))


def _read_pressure(root: Path) -> float | None:
    for key, rest in _read_pairs(root / "proc/pressure/memory", " "):
        if key == "some":
            fields = dict(field.split("=", 1) for field in rest.split())
            return float(fields["avg10"]) / 100
    return None


def _read_pairs(path: Path, separator: str) -> Iterator[tuple[str, str]]:
    """Yield the lines of a file as what is before and after a separator; none if it isn't there."""
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            key, found, rest = line.partition(separator)
            if found:
                yield key.strip(), rest.strip()
