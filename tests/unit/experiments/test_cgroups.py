"""A command under a memory limit, whatever holds it; groups are removed afterwards."""

import sys
from pathlib import Path

import pytest

from scripts.experiments.offload.cgroups import CgroupV2, LimitKind, run_limited

MIB = 2**20
HOLD = "import sys, time; held = bytearray(int(sys.argv[1]) << 20); time.sleep(0.2)"


def run_holding(mib: int, log: Path, *, limit_mib: int | None, kind: LimitKind):
    try:
        return run_limited(
            [sys.executable, "-c", HOLD, str(mib)],
            limit_bytes=None if limit_mib is None else limit_mib * MIB,
            log=log,
            timeout_seconds=30,
            kind=kind,
        )
    except OSError as error:
        if kind is LimitKind.RLIMIT:
            raise
        pytest.skip(str(error))


@pytest.mark.parametrize("kind", LimitKind)
def test_what_fits_survives_and_its_peak_is_known(kind: LimitKind, tmp_path: Path) -> None:
    run = run_holding(64, tmp_path / "log", limit_mib=160, kind=kind)
    assert run.returncode == 0 and run.kind is kind
    assert not run.out_of_memory and not run.timed_out
    assert 64 * MIB <= run.peak_bytes <= 160 * MIB
    assert 64 * MIB <= run.peak_anon_bytes <= 160 * MIB


@pytest.mark.parametrize("kind", LimitKind)
def test_what_does_not_fit_is_out_of_memory(kind: LimitKind, tmp_path: Path) -> None:
    run = run_holding(200, tmp_path / "log", limit_mib=100, kind=kind)
    assert run.returncode != 0
    assert run.out_of_memory


@pytest.mark.parametrize("kind", LimitKind)
def test_without_a_limit_it_only_measures(kind: LimitKind, tmp_path: Path) -> None:
    run = run_holding(64, tmp_path / "log", limit_mib=None, kind=kind)
    assert run.returncode == 0 and run.limit_bytes is None
    assert run.peak_bytes >= 64 * MIB


def test_an_ordinary_failure_is_not_out_of_memory(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-c", "raise SystemExit('nothing to do')"]
    run = run_limited(command, limit_bytes=100 * MIB, log=log, timeout_seconds=30)
    assert run.returncode == 1 and not run.out_of_memory
    assert log.read_text() == "nothing to do\n"


def test_a_command_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    run = run_limited(command, limit_bytes=None, log=tmp_path / "log", timeout_seconds=0.3)
    assert run.timed_out and run.seconds < 10


def test_no_group_is_left(tmp_path: Path) -> None:
    def groups() -> set[Path]:
        return set(Path("/sys/fs/cgroup").rglob("tierhints-*"))

    before = groups()
    run_limited(["true"], limit_bytes=50 * MIB, log=tmp_path / "log", timeout_seconds=10)
    assert groups() <= before


def test_a_v2_group_is_told_its_limit_and_read(tmp_path: Path) -> None:
    for name, text in {
        "memory.max": "",
        "memory.swap.max": "",
        "memory.oom.group": "",
        "memory.stat": "anon 700\nfile 200\n",
        "memory.current": "900",
        "memory.peak": "1000",
        "memory.events": "low 0\nhigh 0\nmax 7\noom 1\noom_kill 1\n",
    }.items():
        (tmp_path / name).write_text(text)
    group = CgroupV2(tmp_path, 4096)
    assert (tmp_path / "memory.max").read_text() == "4096"
    assert (tmp_path / "memory.swap.max").read_text() == "0"
    group.sample(1)
    assert group.peaks() == (1000, 700)
    assert group.was_out_of_memory("")
    (tmp_path / "memory.peak").unlink()  # a kernel before 5.19
    assert group.peaks() == (900, 700)
