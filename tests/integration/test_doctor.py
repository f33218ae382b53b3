"""tierhints doctor: what it says of this machine, of another one, and of an installation."""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest

from lib.commands import doctor
from lib.machine import UNMEASURED, save_machine


def test_the_doctor_describes_this_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # no checkout
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert doctor.main(["--json", "doctor.json"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    document = json.loads(last)
    assert document == json.loads(Path("doctor.json").read_text())
    assert document["cpu"]["cores"] >= 1
    assert document["memory"]["total_bytes"] > document["memory"]["available_bytes"] > 0
    built = document["kernels"]["native"] == "built"
    assert document["kernels"]["linear"]["int4"] == ("encoded" if built else "int4 packed")
    assert document["disk"][0]["path"] == str(tmp_path)
    assert document["machine_file"]["state"] == "off"
    assert document["next"] == "tierhints probe"
    assert "configuration" not in document
    names = {line.split()[0] for line in table if line.strip()}
    assert {"Python", "torch", "CPU", "kernels", "memory", "disk", "machine", "Next:"} <= names


def test_the_doctor_says_which_extras_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    requirements = [
        "torch>=2",
        "matplotlib>=3.8; extra == 'report'",
        'no-such-package; extra == "data"',
        'tierhints[data,report]; extra == "dev"',
    ]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: requirements)
    extras = doctor.probe_extras()
    assert extras == {"report": {"matplotlib": True}, "data": {"no-such-package": False}}
    document: dict[str, Any] = doctor.examine({"SSD tier": Path("/proc")})
    rows = dict(doctor.table_rows(document))
    assert rows["extra data"] == "no-such-package missing: pip install 'tierhints[data]'"
    assert rows["extra report"] == "matplotlib"


def test_the_doctor_refuses_memory_as_a_disk() -> None:
    document = doctor.examine({"SSD tier": Path("/dev/shm")})
    spill = next(each for each in document["features"] if "SSD" in each["feature"])
    if document["disk"][0]["filesystem"] == "tmpfs":
        assert not spill["works"] and "set TMPDIR" in spill["note"]


def test_the_doctor_says_which_machine_file_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "machine.json"
    monkeypatch.delenv("TIERHINTS_MACHINE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = doctor.probe_machine_file()
    assert (found["state"], found["path"]) == ("missing", str(tmp_path / "tierhints/machine.json"))
    assert "tierhints probe" in doctor.describe_machine_file(found)
    monkeypatch.setenv("TIERHINTS_MACHINE", str(path))
    path.write_text("{")
    assert doctor.probe_machine_file()["state"] == "invalid"
    save_machine(UNMEASURED, path)
    found = doctor.probe_machine_file()
    assert (found["state"], found["name"]) == ("valid", UNMEASURED.name)
    assert str(path) in doctor.describe_machine_file(found)
