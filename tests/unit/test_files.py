from pathlib import Path

import pytest

from lib.errors import InputError
from lib.files import check_writable, write_json, write_text


def test_a_link_stays_and_its_target_is_written(tmp_path: Path) -> None:
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    target.write_text("old")
    link.symlink_to(target)
    write_text("new", link)
    assert link.is_symlink()
    assert target.read_text() == "new"


@pytest.mark.parametrize("path", ["/dev/full", "/dev/null", "/proc/none/x", "/tmp"])
def test_what_is_no_regular_file_is_refused_before_the_work(path: str) -> None:
    with pytest.raises(InputError, match=r"output .*give a"):
        check_writable(path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json({"a": 1}, path)
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json({"a": float("nan")}, path)
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert list(tmp_path.iterdir()) == [path]
