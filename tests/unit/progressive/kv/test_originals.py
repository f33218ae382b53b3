"""Files of originals: nobody but their process can ever open one."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lib.errors import PlacementError
from lib.progressive.kv.originals import Originals, OriginalsFolder
from lib.progressive.ladder import PAGE_TOKENS, KvShape

SHAPE = KvShape(layers=1, heads=2, key_dim=16, value_dim=16, itemsize=4)


def refuse_nameless(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have files without a name fail with an error."""
    real = os.open

    def open_file(path: Any, flags: int, *more: Any, **options: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(number, os.strerror(number))
        return real(path, flags, *more, **options)

    monkeypatch.setattr("os.open", open_file)


def check_round_trip(folder: Path) -> None:
    originals = Originals(OriginalsFolder(folder), SHAPE, 2)
    assert not list(folder.iterdir())
    states = torch.randn(2, 2 * PAGE_TOKENS, 2, 16)
    originals.write(0, 0, *states)
    read = torch.empty_like(states)
    originals.read(0, 2, *read)
    assert torch.equal(read, states)
    originals.close()


def test_a_file_never_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        os.close(os.open(tmp_path, os.O_TMPFILE | os.O_RDWR))
    except OSError:
        pytest.skip("the file system has no files without a name")
    monkeypatch.delattr("tempfile.mkstemp")
    check_round_trip(tmp_path)


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EISDIR])
def test_where_there_are_none_it_loses_its_name_at_once(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_nameless(number, monkeypatch)
    check_round_trip(tmp_path)


def test_a_disk_without_room_is_no_such_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = OriginalsFolder(tmp_path)
    refuse_nameless(errno.ENOSPC, monkeypatch)
    monkeypatch.delattr("tempfile.mkstemp")
    with pytest.raises(PlacementError, match="No space left on device"):
        Originals(folder, SHAPE, 1)
