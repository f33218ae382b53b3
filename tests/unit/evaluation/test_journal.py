"""What the journal keeps, and what of a file it doesn't use."""

from pathlib import Path
from typing import Any

import pytest

from lib.errors import InputError
from lib.evaluation.journal import Journal

SUBJECT = {"model": "sha256:1", "seed": 0}


def keep(path: Path, names: list[str], subject: dict[str, Any] = SUBJECT) -> list[str]:
    """Take steps until the one called "fail"; return those that had to be computed."""
    computed: list[str] = []

    def compute(name: str) -> list[Any]:
        computed.append(name)
        if name == "fail":
            raise KeyboardInterrupt
        return [0.1 + 0.2, {"name": name}]

    with pytest.raises(KeyboardInterrupt), Journal(path, subject) as journal:
        for name in names:
            assert journal(name, lambda name=name: compute(name)) == [0.1 + 0.2, {"name": name}]
    return computed


def test_steps_are_kept_over_an_interruption(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "hints.json.calibration"
    assert keep(path, ["a", "b", "fail"]) == ["a", "b", "fail"]
    assert "2 steps are kept in" in capsys.readouterr().err
    assert keep(path, ["a", "b", "c", "fail"]) == ["c", "fail"]
    assert "going on after 2 steps" in capsys.readouterr().err
    with Journal(path, SUBJECT) as journal:
        assert journal("c", list)[1] == {"name": "c"}
    assert not path.exists()


def test_what_was_cut_off_is_computed_again(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    keep(path, ["a", "b", "fail"])
    path.write_bytes(path.read_bytes()[:-5])
    assert keep(path, ["a", "b", "fail"]) == ["b", "fail"]
    assert keep(path, ["a", "b", "fail"]) == ["fail"]


@pytest.mark.parametrize("damage", ["bits", "text", "foreign"])
def test_damaged_and_foreign_files_are_replaced(tmp_path: Path, capsys: Any, damage: str) -> None:
    path = tmp_path / "journal"
    keep(path, ["a", "b", "fail"], {"model": "sha256:2"} if damage == "foreign" else SUBJECT)
    data = path.read_bytes()
    if damage == "bits":
        path.write_bytes(data.replace(b'"a"', b'"z"', 1))
    elif damage == "text":
        path.write_bytes(b"something else\n" + data)
    capsys.readouterr()
    assert keep(path, ["a", "fail"]) == ["a", "fail"]
    message = "of another measurement" if damage == "foreign" else "is damaged"
    assert message in capsys.readouterr().err
    assert keep(path, ["a", "fail"]) == ["fail"]


def test_nothing_is_left_where_nothing_was_found(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    keep(path, ["fail"])
    assert not path.exists()
    with pytest.raises(InputError, match="can't be written"), Journal(tmp_path, SUBJECT):
        pass
