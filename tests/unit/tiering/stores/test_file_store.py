"""What only files can do wrong, and what lasts beyond a process."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from byte_payloads import KEY, OTHER, SIZE, block_path, flip, payload, read
from torch import Tensor

from lib.errors import InputError, PlacementError
from lib.tiering.stores import (
    CHUNK_BYTES,
    FileStore,
    aligned_buffer,
    block_file,
    file,
    filesystem_type,
    folders,
)
from lib.units import SECTOR_BYTES


def test_files_are_used_again(tmp_path: Path) -> None:
    first = FileStore(tmp_path)
    first.put(KEY, SIZE, [payload()])
    first.close()
    written = block_path(tmp_path).stat()
    second = FileStore(tmp_path)
    assert second.has(KEY)
    second.put(KEY, SIZE, [])
    assert torch.equal(read(second), payload())
    assert block_path(tmp_path).stat().st_ino == written.st_ino


def test_a_payload_of_another_length_is_written_anew(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    store.put(KEY, SIZE, [payload()])
    store.put(KEY, CHUNK_BYTES, [payload(CHUNK_BYTES, seed=1)])
    assert torch.equal(read(store), payload(CHUNK_BYTES, seed=1))


HEADER = block_file.header_bytes(SIZE)
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "magic": (lambda path: flip(path, 0), "does not begin like a block file"),
    "version": (lambda path: flip(path, 8), r"has format version 0, and this program reads 1"),
    "size in the header": (lambda path: flip(path, 17), "damaged header"),
    "key in the header": (lambda path: flip(path, 24), "damaged header"),
    "header checksum": (lambda path: flip(path, 161), "damaged header"),
    "table": (lambda path: flip(path, SECTOR_BYTES + 9), "damaged header"),
    "cut": (lambda path: os.truncate(path, HEADER + CHUNK_BYTES), r"has .* of .* \(truncated\)"),
    "cut in the header": (lambda path: os.truncate(path, 100), r"has 100 bytes.*\(truncated\)"),
    "empty": (lambda path: os.truncate(path, 0), r"has 0 bytes.*\(truncated\)"),
    "too long": (lambda path: os.truncate(path, HEADER + SIZE + 1), "too long"),
    "removed": (lambda path: path.unlink(), r"can't be read from .*\(it was removed\)"),
    "another payload": (
        lambda path: path.write_bytes(block_path(path.parent, OTHER).read_bytes()),
        f"holds another payload \\({OTHER}\\)",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_file_is_refused_and_written_anew(tmp_path: Path, what: str) -> None:
    first = FileStore(tmp_path)
    first.put(KEY, SIZE, [payload()])
    first.put(OTHER, SIZE, [payload(seed=1)])
    first.close()
    damage, message = DAMAGE[what]
    damage(block_path(tmp_path))
    store = FileStore(tmp_path)
    assert not store.has(KEY)
    with pytest.raises(PlacementError, match=rf"payload {KEY}.*{message}"):
        store.read_into(KEY, 0, aligned_buffer(SIZE))
    store.put(KEY, SIZE, [payload()])
    assert torch.equal(read(store), payload())


@pytest.mark.parametrize("position", [0, CHUNK_BYTES, SIZE - 1])
@pytest.mark.parametrize("opened", [True, False])
def test_a_flipped_byte_is_refused_and_the_rest_is_read(
    tmp_path: Path, position: int, opened: bool
) -> None:
    store = FileStore(tmp_path)
    store.put(KEY, SIZE, [payload()])
    if opened:
        read(store)
    flip(block_path(tmp_path), HEADER + position)
    with pytest.raises(PlacementError, match=rf"{KEY}.block fails its checksum.*remove the file"):
        read(store)
    good = CHUNK_BYTES if position < CHUNK_BYTES else 0
    out = read(store, start=good, end=good + CHUNK_BYTES)
    assert torch.equal(out, payload()[good : good + CHUNK_BYTES])


def test_a_file_that_is_cut_while_open_is_refused(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    store.put(KEY, SIZE, [payload()])
    read(store)
    os.truncate(block_path(tmp_path), HEADER + CHUNK_BYTES)
    with pytest.raises(PlacementError, match=rf"{KEY}.block ends at byte .*truncated"):
        read(store)


def test_a_file_that_is_removed_or_replaced_while_open_is_still_read(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    for key, seed in ((KEY, 0), (OTHER, 1)):
        store.put(key, SIZE, [payload(seed=seed)])
        read(store, key)
    block_path(tmp_path, OTHER).replace(block_path(tmp_path))
    assert torch.equal(read(store), payload())
    assert torch.equal(read(store, OTHER), payload(seed=1))


def test_a_read_error_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    store = FileStore(tmp_path)
    store.put(KEY, SIZE, [payload()])
    read(store)
    with monkeypatch.context() as patch:
        patch.setattr(block_file.os, "preadv", fail)
        with pytest.raises(PlacementError, match=rf"payload {KEY} .*{KEY}.block .Input/output err"):
            store.read_into(KEY, 0, aligned_buffer(SIZE))
    assert torch.equal(read(store), payload())


def test_bytes_are_read_into_place_and_without_a_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FileStore(tmp_path)
    store.put(KEY, SIZE, [payload()])
    out = aligned_buffer(SIZE)
    read(store)
    both = threading.Barrier(2, timeout=10)
    places = []
    real = os.preadv

    def meet(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        both.wait()
        places.append(np.frombuffer(buffers[0], dtype=np.uint8).ctypes.data)
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(block_file.os, "preadv", meet)
    with ThreadPoolExecutor(2) as threads:
        list(
            threads.map(
                lambda start: store.read_into(KEY, start, out[start : start + CHUNK_BYTES]),
                (0, CHUNK_BYTES),
            )
        )
    assert sorted(places) == [out.data_ptr(), out.data_ptr() + CHUNK_BYTES]


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    monkeypatch.setattr(
        block_file.os, "preadv", lambda fd, to, offset: real(fd, [to[0][:SECTOR_BYTES]], offset)
    )
    store = FileStore(tmp_path)
    store.put(KEY, SIZE, [payload()])
    assert torch.equal(read(store), payload())


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_or_failing_disk_leaves_no_partial_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    def fail(*arguments: object) -> int:
        raise OSError(number, os.strerror(number))

    store = FileStore(tmp_path)
    message = r"can't be written to .*output error.*spill_dir"
    if number != errno.EIO:
        message = rf"No space left.* needs {HEADER + SIZE} bytes .* where \d+ .*spill_dir"
    with monkeypatch.context() as patch:
        patch.setattr(file.os, call, fail)
        with pytest.raises(PlacementError, match=message):
            store.put(KEY, SIZE, [payload()])
    assert list(tmp_path.iterdir()) == []
    store.put(KEY, SIZE, [payload()])


def test_too_little_room_is_told_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FileStore(tmp_path)
    monkeypatch.setattr(FileStore, "capacity_bytes", lambda _: SIZE)
    with pytest.raises(PlacementError, match=rf"needs {HEADER + SIZE} bytes.* where {SIZE} .*free"):
        store.put(KEY, SIZE, iter(lambda: pytest.fail("the parts were asked for"), None))


def test_writers_of_one_payload_do_not_meet(tmp_path: Path) -> None:
    stores = [FileStore(tmp_path) for _ in range(4)]
    start = threading.Barrier(len(stores), timeout=10)

    def parts() -> Iterator[Tensor]:
        start.wait()
        yield payload()

    with ThreadPoolExecutor(len(stores)) as threads:
        list(threads.map(lambda store: store.put(KEY, SIZE, parts()), stores))
    assert list(tmp_path.iterdir()) == [block_path(tmp_path)]
    for store in stores:
        assert torch.equal(read(store), payload())


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    dead = tmp_path / ".00ef.0123456789abcdef.partial"
    dead.write_bytes(b"half")
    living, lock = folders.create_partial(tmp_path, KEY)
    (tmp_path / "notes.txt").write_text("mine")
    FileStore(tmp_path)
    os.close(lock)
    assert {path.name for path in tmp_path.iterdir()} == {living.name, "notes.txt"}


def test_a_temporary_folder_goes_with_its_store(tmp_path: Path) -> None:
    closed, dropped = FileStore(tmp_path, temporary=True), FileStore(tmp_path, temporary=True)
    for store in (closed, dropped):
        store.put(KEY, SIZE, [payload()])
    assert closed.folder != dropped.folder
    closed.close()
    assert list(tmp_path.iterdir()) == [dropped.folder]
    assert torch.equal(read(dropped), payload())
    del dropped, store
    assert list(tmp_path.iterdir()) == []


def test_temporary_folders_of_killed_processes_are_removed(tmp_path: Path) -> None:
    dead, foreign = tmp_path / "tierhints-dead", tmp_path / "tierhints-notes"
    for folder in (dead, foreign):
        folder.mkdir()
        (folder / "file").write_text("")
    (dead / ".tierhints-lock").write_text("")
    first = FileStore(tmp_path, temporary=True)
    second = FileStore(tmp_path, temporary=True)
    assert set(tmp_path.iterdir()) == {foreign, first.folder, second.folder}


def test_a_forked_child_leaves_its_parents_folder(tmp_path: Path) -> None:
    folder, lock = folders.make_temporary_folder(tmp_path)
    folders.remove_temporary_folder(folder, lock, owner=os.getpid() + 1)
    assert folder.exists()
    folders.remove_temporary_folder(folder, lock, owner=os.getpid())
    assert not folder.exists()


def test_few_files_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def count_open() -> int:
        links = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
        return sum(str(tmp_path) in os.readlink(link) for link in links if link.is_symlink())

    monkeypatch.setattr(file, "_max_open_files", lambda: 2)
    store = FileStore(tmp_path)
    keys = [f"{number:04x}" for number in range(5)]
    for key in keys * 2:
        store.put(key, SECTOR_BYTES, [payload(SECTOR_BYTES)])
        read(store, key)
    assert count_open() == 2
    store.close()
    assert count_open() == 0


@pytest.mark.parametrize("temporary", [True, False])
def test_memory_is_refused_as_a_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temporary: bool
) -> None:
    monkeypatch.setattr(folders, "filesystem_type", lambda _: "tmpfs")
    with pytest.raises(InputError, match="tmpfs, which is memory"):
        FileStore(tmp_path / "new", temporary=temporary)
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_spill_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="spill_dir"):
        FileStore(tmp_path / "file" / "folder")


def test_direct_reads_are_tried_and_other_errors_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int, data: memoryview, offset: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(folders.os, "pwrite", fail)
    number = errno.EINVAL
    assert not folders.accepts_direct_io(tmp_path)
    number = errno.EROFS
    with pytest.raises(InputError, match="Read-only"):
        folders.accepts_direct_io(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/mounts").exists(), reason="Linux only")
def test_the_file_system_of_a_path_is_found() -> None:
    assert filesystem_type(Path("/proc/self")) == "proc"
