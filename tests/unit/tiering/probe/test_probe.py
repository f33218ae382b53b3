import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from lib.commands import probe as probe_machine
from lib.errors import InputError, PlacementError
from lib.machine import TierSpec, find_machine, load_machine
from lib.tiering.probe import lanes
from lib.tiering.probe.compute import measure_rows
from lib.tiering.probe.links import FileProbe, make_profile, time_lanes
from lib.tiering.stores import CHUNK_BYTES, FileStore
from lib.units import MIB
from lib.vocabulary import Precision, Tier

SIZES = (MIB, 4 * MIB, 16 * MIB)


@dataclass(slots=True)
class SpecLane:
    """A tier that takes exactly as long as its spec says, but for the first time."""

    tier: Tier
    name: str
    capacity_bytes: int | None
    spec: TierSpec
    asked: list[int] = field(default_factory=list)

    def unit_seconds(self, unit_bytes: int) -> float:
        self.asked.append(unit_bytes)
        first = len(self.asked) <= len(SIZES)
        return 9.0 if first else self.spec.transfer_seconds(unit_bytes)

    def close(self) -> None:
        pass


def test_a_profile_has_what_was_timed_after_the_warm_up() -> None:
    specs = {Tier.CPU: TierSpec("RAM", 40, 12), Tier.SSD: TierSpec("disk", 90, 2.5)}
    lanes = [
        SpecLane(Tier.CPU, "RAM", None, specs[Tier.CPU]),
        SpecLane(Tier.SSD, "disk", 10**9, specs[Tier.SSD]),
    ]
    points = time_lanes(lanes, SIZES, range(3))
    machine = make_profile("toy", lanes, points, {"fp32": 1e9})
    assert [lane.asked for lane in lanes] == [list(SIZES) * 4] * 2
    assert [(point.num_bytes, point.n) for point in points[Tier.SSD]] == [(s, 3) for s in SIZES]
    assert machine.measured
    assert machine.capacity_bytes == {Tier.SSD: 10**9}
    assert machine.compute == {"fp32": 1e9}
    for tier, spec in specs.items():
        assert machine.tiers[tier].setup_us == pytest.approx(spec.setup_us)
        assert machine.tiers[tier].bandwidth_gb_s == pytest.approx(spec.bandwidth_gb_s)


@pytest.mark.parametrize("unit_bytes", [CHUNK_BYTES + 1, [CHUNK_BYTES, 2 * MIB]])
def test_a_disk_is_timed_again_and_again(tmp_path: Path, unit_bytes: int | Sequence[int]) -> None:
    with FileProbe(tmp_path, file_bytes=4 * MIB) as file_probe:
        for _ in range(2):
            spec = file_probe.measure(unit_bytes, seconds=0.01)
            assert 0.001 < spec.bandwidth_gb_s < 1000
            assert spec.setup_us == 0 or not isinstance(unit_bytes, int)
        with pytest.raises(InputError, match=r"units of 8.0 MiB are larger .* of 4.0 MiB"):
            file_probe.measure(8 * MIB, seconds=0.01)
    assert list(tmp_path.iterdir()) == []


def test_the_probe_reads_as_the_engine_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []
    real = FileStore.read_into

    def count(self: FileStore, key: str, start: int, out: torch.Tensor) -> None:
        reads.append((start, len(out)))
        real(self, key, start, out)

    monkeypatch.setattr(FileStore, "read_into", count)
    monkeypatch.setattr(lanes, "_TIMED_BYTES", 0)
    with FileProbe(tmp_path, file_bytes=16 * MIB) as file_probe:
        file_probe.measure(5 * MIB, seconds=0)
    # Two rounds (one is the warm-up) of two units, in pieces of 4 MiB and the rest.
    pieces = [(0, 4), (4, 1), (5, 4), (9, 1), (10, 4), (14, 1), (0, 4), (4, 1)]
    assert sorted(reads) == sorted((start * MIB, size * MIB) for start, size in pieces)


def test_contention_is_how_much_computing_and_reading_slow_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, computing = threading.Event(), threading.Event()
    real = FileStore.read_into

    def note(self: FileStore, key: str, start: int, out: torch.Tensor) -> None:
        reading.set()
        real(self, key, start, out)
        time.sleep(0.06 if computing.is_set() else 0.03)

    def compute() -> None:
        reading.clear()
        computing.set()
        time.sleep(0.12)
        time.sleep(0.12 if reading.is_set() else 0)
        computing.clear()

    monkeypatch.setattr(FileStore, "read_into", note)
    with FileProbe(tmp_path, file_bytes=2 * MIB) as file_probe:
        contention = file_probe.measure_contention(compute, unit_bytes=MIB, seconds=1.2)
    assert 0.5 < contention.slowdown < 2
    assert 0.3 < contention.link_share < 0.9
    assert list(tmp_path.iterdir()) == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("Thread-")]


def test_a_read_error_ends_the_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: FileStore, key: str, start: int, out: torch.Tensor) -> None:
        raise PlacementError("broken")

    monkeypatch.setattr(FileStore, "read_into", fail)
    with (
        pytest.raises(PlacementError, match="broken"),
        FileProbe(tmp_path, file_bytes=MIB) as file_probe,
    ):
        file_probe.measure(MIB, seconds=0)
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_a_machine_file_and_one_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(probe_machine, "_QUICK_LARGEST", 4 * MIB)
    spill = tmp_path / "spill"
    arguments = ["--quick", "--size", "8MiB", "--repeats", "1", "--spill-dir", str(spill)]
    output = tmp_path / "machine.json"
    assert probe_machine.main([*arguments, "--output", str(output), "--name", "toy"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    machine = load_machine(output)
    assert machine.name == "toy"
    assert machine.measured
    assert machine.compute.keys() == set(Precision)
    assert all(1e6 < rate < 1e15 for rate in machine.compute.values())
    assert {Tier.HBM, Tier.CPU, Tier.SSD} <= set(machine.tiers)
    assert document["machine"]["tiers"].keys() == document["points"].keys()
    assert all(point["median_s"] > 0 for points in document["points"].values() for point in points)
    assert document["disk"]["file_bytes"] == 8 * MIB
    assert list(spill.iterdir()) == []


def test_the_machine_file_goes_where_plans_look_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(probe_machine, "_QUICK_LARGEST", MIB)
    arguments = ["--quick", "--size", "2MiB", "--repeats", "1", "--spill-dir", str(tmp_path)]
    with pytest.raises(InputError, match="TIERHINTS_MACHINE is empty"):
        probe_machine.main(arguments)
    monkeypatch.delenv("TIERHINTS_MACHINE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert probe_machine.main([*arguments, "--name", "toy"]) == 0
    path = tmp_path / "cache" / "tierhints" / "machine.json"
    assert f"Written: {path} (used by every plan" in capsys.readouterr().out
    machine = find_machine()
    assert machine is not None and machine.name == "toy"


@pytest.mark.parametrize("size", ["1MiB", "big"])
def test_a_size_that_is_too_small_or_none_is_refused(tmp_path: Path, size: str) -> None:
    with pytest.raises(InputError, match=size):
        probe_machine.main(["--quick", "--size", size, "--output", str(tmp_path / "m.json")])


def test_products_with_several_rows_are_timed_once() -> None:
    rate = measure_rows(32, torch.float32)
    assert rate > 0
    assert measure_rows(32, torch.float32) == rate
