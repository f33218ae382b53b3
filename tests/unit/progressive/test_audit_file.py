"""What audits found outlives a server, and adds up with what others find."""

import errno
from pathlib import Path
from typing import Any

import pytest

from lib.errors import InputError
from lib.progressive.audit import AuditCounts
from lib.progressive.audit_file import AuditFile


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    path = tmp_path / "calibration.json"
    path.write_text("{}")
    return path


def test_what_was_stopped_stays_so_for_its_calibration_alone(calibration: Path) -> None:
    first = AuditFile(calibration, "a")
    for _ in range(5):
        first.add(0.05, broken=True)
    for _ in range(100):
        first.add(0.05, broken=False)
    again = AuditFile(calibration, "a")
    assert again.found == {0.05: AuditCounts(audits=105, broken=5, stopped=True)}
    other = AuditFile(calibration, "b")
    assert not other.found
    other.add(0.01, broken=False)
    assert AuditFile(calibration, "a").found == again.found
    assert sorted(each.name for each in calibration.parent.iterdir()) == [
        "calibration.json",
        "calibration.json.audits",
    ]


def test_servers_that_share_it_make_one_test(calibration: Path) -> None:
    one, other = AuditFile(calibration, "a"), AuditFile(calibration, "a")
    for _ in range(2):
        one.add(0.05, broken=True)
        other.add(0.05, broken=True)
    one.add(0.05, broken=True)
    assert one.found == {0.05: AuditCounts(audits=5, broken=5, stopped=True)}
    assert not other.found[0.05].stopped
    other.add(0.1, broken=False)
    assert other.found[0.05].stopped


def test_what_couldnt_be_written_is_with_the_next(
    calibration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "no room")

    audits = AuditFile(calibration, "a")
    audits.add(0.05, broken=False)
    before = audits.path.read_bytes()
    with monkeypatch.context() as context:
        context.setattr("os.fsync", full)
        with pytest.raises(OSError, match="no room"):
            audits.add(0.05, broken=True)
    assert audits.path.read_bytes() == before
    audits.add(0.1, broken=True)
    assert AuditFile(calibration, "a").found == {
        0.05: AuditCounts(audits=2, broken=1),
        0.1: AuditCounts(audits=1, broken=1),
    }


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"format": "other"}',
        '{"format": "tierhints audits of calibrations 1", "calibrations": {"a": {"x": {}}}}',
        '{"format": "tierhints audits of calibrations 1", "calibrations": '
        '{"a": {"0.05": {"audits": 1, "broken": 2, "stopped": false}}}}',
        '{"format": "tierhints audits of calibrations 1", "calibrations": {"a": {"0.05": 1}}}',
    ],
)
def test_a_file_of_something_else_is_refused(calibration: Path, text: str) -> None:
    calibration.with_name("calibration.json.audits").write_text(text)
    with pytest.raises(InputError, match="isn't what audits have found"):
        AuditFile(calibration, "a")


def test_where_nothing_can_be_written_nothing_begins(tmp_path: Path) -> None:
    (tmp_path / "calibration.json.audits").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        AuditFile(tmp_path / "calibration.json", "a")
