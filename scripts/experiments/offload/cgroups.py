"""Run a command inside a memory limit, and say how much memory it took.

Where this user may make memory cgroups (v1 or v2), the command gets a fresh one below the caller's
own, so that every limit above still holds: page cache, kernel memory and children count, swap is
shut, and the peak is the kernel's. Elsewhere RLIMIT_DATA bounds the private memory of the process,
the page cache is not limited, and the peak is its resident set; ``LimitedRun.kind`` says which.
"""

import ctypes
import os
import re
import resource
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

SAMPLE_SECONDS = 0.05
"""Between two looks at what the kernel keeps no peak of."""
_OUT_OF_MEMORY = re.compile(
    r"MemoryError|bad_alloc|[Cc]annot allocate memory|can't allocate memory|[Oo]ut of memory"
)
_PR_SET_PDEATHSIG = 1


class LimitKind(StrEnum):
    """What holds the limit."""

    CGROUP_V1 = "cgroup v1"
    CGROUP_V2 = "cgroup v2"
    RLIMIT = "RLIMIT_DATA"


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitedRun:
    """How a command ended. ``peak_bytes`` is the group's, page cache included, or with RLIMIT_DATA
    the resident set of the process; ``peak_anon_bytes`` (memory that no file backs) is sampled.
    """

    returncode: int
    kind: LimitKind
    limit_bytes: int | None
    peak_bytes: int
    peak_anon_bytes: int
    out_of_memory: bool
    timed_out: bool
    seconds: float


class _Limit(Protocol):
    kind: LimitKind

    def enter(self) -> None:
        """Put the calling process, just forked, under the limit."""

    def sample(self, pid: int) -> None: ...

    def peaks(self) -> tuple[int, int]: ...

    def was_out_of_memory(self, log: str) -> bool: ...

    def close(self) -> None: ...


def run_limited(
    command: Sequence[str],
    *,
    limit_bytes: int | None,
    log: Path,
    timeout_seconds: float,
    environment: Mapping[str, str] | None = None,
    kind: LimitKind | None = None,
) -> LimitedRun:
    """Run a command to its end, its output in ``log``; None as limit: only measure.

    The process dies with the caller. ``kind`` forces a way of limiting (for tests). Raises OSError
    where the command can't be started.
    """
    limit = _make_limit(limit_bytes, kind)
    libc = ctypes.CDLL(None, use_errno=True)

    def enter() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        limit.enter()

    start = time.monotonic()
    timed_out = False
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=None if environment is None else dict(environment),
                preexec_fn=enter,
            )
            try:
                while process.poll() is None:
                    limit.sample(process.pid)
                    timed_out = time.monotonic() - start > timeout_seconds
                    if timed_out:
                        break
                    time.sleep(SAMPLE_SECONDS)
            finally:
                process.kill()
                process.wait()
        peak, anonymous = limit.peaks()
        text = log.read_text(errors="replace")
        return LimitedRun(
            returncode=process.returncode,
            kind=limit.kind,
            limit_bytes=limit_bytes,
            peak_bytes=peak,
            peak_anon_bytes=anonymous,
            out_of_memory=process.returncode != 0 and limit.was_out_of_memory(text),
            timed_out=timed_out,
            seconds=time.monotonic() - start,
        )
    finally:
        limit.close()


class CgroupV1:
    """A memory group of the v1 hierarchy."""

    kind = LimitKind.CGROUP_V1

    def __init__(self, folder: Path, limit_bytes: int | None) -> None:
        self._folder = folder
        self._anonymous = 0
        if limit_bytes is None:
            return
        _write(folder / "memory.limit_in_bytes", limit_bytes)
        with_swap = folder / "memory.memsw.limit_in_bytes"
        if with_swap.exists():
            _write(with_swap, limit_bytes)
        else:
            _write(folder / "memory.swappiness", 0)

    def enter(self) -> None:
        _write(self._folder / "cgroup.procs", os.getpid())

    def sample(self, pid: int) -> None:
        """Note what only a look can tell."""
        self._anonymous = max(self._anonymous, _field(self._folder / "memory.stat", "total_rss"))

    def peaks(self) -> tuple[int, int]:
        """Return the group's peak, and the sampled one of anonymous memory."""
        return int((self._folder / "memory.max_usage_in_bytes").read_text()), self._anonymous

    def was_out_of_memory(self, log: str) -> bool:
        """Say whether the kernel killed a process in the group."""
        return _field(self._folder / "memory.oom_control", "oom_kill") > 0

    def close(self) -> None:
        """Drop the group's page cache and remove it."""
        with suppress(OSError):
            _write(self._folder / "memory.force_empty", 0)
        _remove_group(self._folder)


class CgroupV2:
    """A group of the unified hierarchy."""

    kind = LimitKind.CGROUP_V2

    def __init__(self, folder: Path, limit_bytes: int | None) -> None:
        self._folder = folder
        self._anonymous = self._current = 0
        if limit_bytes is not None:
            _write(folder / "memory.max", limit_bytes)
        with suppress(OSError):  # not there where the kernel has no swap accounting
            _write(folder / "memory.swap.max", 0)
        with suppress(OSError):
            _write(folder / "memory.oom.group", 1)

    def enter(self) -> None:
        _write(self._folder / "cgroup.procs", os.getpid())

    def sample(self, pid: int) -> None:
        """Note what only a look can tell."""
        self._anonymous = max(self._anonymous, _field(self._folder / "memory.stat", "anon"))
        self._current = max(self._current, int((self._folder / "memory.current").read_text()))

    def peaks(self) -> tuple[int, int]:
        """Return the group's peak (sampled before Linux 5.19), and that of anonymous memory."""
        peak = self._folder / "memory.peak"
        return int(peak.read_text()) if peak.exists() else self._current, self._anonymous

    def was_out_of_memory(self, log: str) -> bool:
        """Say whether the kernel killed a process in the group."""
        return _field(self._folder / "memory.events", "oom_kill") > 0

    def close(self) -> None:
        """Drop the group's page cache, as far as it can be told to, and remove it."""
        with suppress(OSError):
            _write(self._folder / "memory.reclaim", self._current)
        _remove_group(self._folder)


class DataLimit:
    """RLIMIT_DATA: private writable memory of one process, page cache free."""

    kind = LimitKind.RLIMIT

    def __init__(self, limit_bytes: int | None) -> None:
        self._limit_bytes = limit_bytes
        self._peak = self._anonymous = 0

    def enter(self) -> None:
        if self._limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (self._limit_bytes, self._limit_bytes))

    def sample(self, pid: int) -> None:
        """Read the process's own marks; it may just have ended."""
        with suppress(OSError):
            status = Path(f"/proc/{pid}/status")
            self._peak = max(self._peak, 1024 * _field(status, "VmHWM:"))
            self._anonymous = max(self._anonymous, 1024 * _field(status, "RssAnon:"))

    def peaks(self) -> tuple[int, int]:
        """Return the high-water mark of the resident set, and the sampled anonymous peak."""
        return self._peak, self._anonymous

    def was_out_of_memory(self, log: str) -> bool:
        """Guess from what the process said: a refused allocation is an ordinary error here."""
        return _OUT_OF_MEMORY.search(log) is not None

    def close(self) -> None:
        """Do nothing: the limit went with the process."""


def _make_limit(limit_bytes: int | None, kind: LimitKind | None) -> _Limit:
    makers: dict[LimitKind, Callable[[], _Limit | None]] = {
        LimitKind.CGROUP_V1: lambda: _make_v1(limit_bytes),
        LimitKind.CGROUP_V2: lambda: _make_v2(limit_bytes),
        LimitKind.RLIMIT: lambda: DataLimit(limit_bytes),
    }
    for candidate in LimitKind if kind is None else [kind]:
        if (limit := makers[candidate]()) is not None:
            return limit
    raise OSError(f"this user can't make a {kind} group here")


def _make_v1(limit_bytes: int | None) -> CgroupV1 | None:
    root, own = _mount("cgroup", "memory"), _own_group("memory")
    if root is None or own is None:
        return None
    # The name in /proc is of the host; inside a container's mount it may not exist.
    for parent in (root / own, root):
        folder = _make_folder(parent)
        if folder is not None:
            return CgroupV1(folder, limit_bytes)
    return None


def _make_v2(limit_bytes: int | None) -> CgroupV2 | None:
    root, own = _mount("cgroup2", None), _own_group("")
    if root is None or own is None:
        return None
    # A group with processes can't hand its controllers down, so that the next one above must.
    for parent in (root / own, *(root / own).parents):
        if not parent.is_relative_to(root):
            return None
        control = parent / "cgroup.subtree_control"
        with suppress(OSError):
            if "memory" not in control.read_text().split():
                _write(control, "+memory")
            if (folder := _make_folder(parent)) is not None:
                return CgroupV2(folder, limit_bytes)
    return None


def _mount(filesystem: str, option: str | None) -> Path | None:
    """Return where a hierarchy is mounted, the one with ``option`` where that is asked for."""
    with suppress(OSError):
        for line in Path("/proc/self/mounts").read_text().splitlines():
            _, folder, kind, options, *_ = line.split()
            if kind == filesystem and (option is None or option in options.split(",")):
                return Path(folder)
    return None


def _own_group(controller: str) -> str | None:
    """Return this process's group in a hierarchy, relative to its mount."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(","):
                return path.lstrip("/")
    return None


def _make_folder(parent: Path) -> Path | None:
    try:
        return Path(tempfile.mkdtemp(prefix="tierhints-", dir=parent))
    except OSError:
        return None


def _remove_group(folder: Path) -> None:
    """Remove a group whose processes have ended: the kernel may need a moment to see it."""
    for _ in range(50):
        try:
            folder.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.02)
    folder.rmdir()


def _write(path: Path, value: int | str) -> None:
    """Write a control file in one call."""
    file = os.open(path, os.O_WRONLY)
    try:
        os.write(file, str(value).encode())
    finally:
        os.close(file)


def _field(path: Path, name: str) -> int:
    """Return the number after ``name`` in a file of names and numbers; 0 where it isn't there."""
    for line in path.read_text().splitlines():
        words = line.split()
        if words[0] == name:
            return int(words[1])
    return 0
