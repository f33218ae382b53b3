"""One suite for every store, then what only files can do wrong."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from lib.errors import InputError, PlacementError
from lib.tiering import stores
from lib.tiering.stores import FileStore, HostStore, Store, filesystem_type

TENSORS = {
    "weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "transposed": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).t(),
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "flags": torch.tensor([True, False, True]),
}


@pytest.fixture(params=["host", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    make: dict[str, Callable[[], Store]] = {
        "host": lambda: HostStore(pinned=False),
        "file": lambda: FileStore(tmp_path),
    }
    made = make[request.param]()
    yield made
    made.close()


def test_tensors_come_back_exactly(store: Store) -> None:
    store.put("block", TENSORS)
    for key, tensor in store.get("block").items():
        assert torch.equal(tensor, TENSORS[key])
        assert tensor.dtype == TENSORS[key].dtype
        assert tensor.stride() == TENSORS[key].stride()


def test_a_store_keeps_a_copy(store: Store) -> None:
    tensor = torch.ones(4)
    store.put("block", {"w": tensor})
    tensor.zero_()
    assert torch.equal(store.get("block")["w"], torch.ones(4))


def test_blocks_do_not_mix(store: Store) -> None:
    store.put("a", {"w": torch.zeros(2)})
    store.put("b", {"w": torch.ones(2)})
    assert store.get("a")["w"].sum() == 0
    assert store.get("b")["w"].sum() == 2


def block_file(folder: Path) -> Path:
    (path,) = folder.rglob("*.block")
    return path


def test_two_models_in_one_spill_folder_do_not_meet(tmp_path: Path) -> None:
    first, second = FileStore(tmp_path), FileStore(tmp_path)
    first.put("block", {"w": torch.zeros(2)})
    second.put("block", {"w": torch.ones(2)})
    assert first.get("block")["w"].sum() == 0
    first.close()
    assert second.get("block")["w"].sum() == 2
    second.close()
    assert list(tmp_path.iterdir()) == []


def test_a_flipped_byte_is_refused(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    store.put("block", TENSORS)
    path = block_file(tmp_path)
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    with pytest.raises(PlacementError, match="'block'.*checksum"):
        store.get("block")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    store.put("block", TENSORS)
    os.truncate(block_file(tmp_path), 7)
    with pytest.raises(PlacementError, match="'block'.*7 of .*truncated"):
        store.get("block")


def test_a_removed_file_is_refused(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    store.put("block", TENSORS)
    block_file(tmp_path).unlink()
    with pytest.raises(PlacementError, match="'block' can't be read"):
        store.get("block")


def test_a_full_disk_leaves_no_partial_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    store = FileStore(tmp_path)
    monkeypatch.setattr(stores.os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        store.put("block", TENSORS)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_memory_is_refused_as_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "filesystem_type", lambda path: "tmpfs")
    with pytest.raises(InputError, match="tmpfs, which is memory"):
        FileStore(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_spill_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="spill_dir"):
        FileStore(tmp_path / "file" / "folder")


@pytest.mark.skipif(not Path("/proc/mounts").exists(), reason="Linux only")
def test_the_file_system_of_a_path_is_found() -> None:
    assert filesystem_type(Path("/proc/self")) == "proc"
