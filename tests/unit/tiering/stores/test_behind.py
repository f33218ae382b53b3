"""Writing behind: what gets to the store, when, and what is in memory until then."""

import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lib.errors import PlacementError
from lib.tiering.stores import aligned_buffer, behind
from lib.tiering.stores.behind import WriteBehind
from lib.tiering.stores.file import FileStore
from lib.units import SECTOR_BYTES

WAIT_SECONDS = 10


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FileStore]:
    store = FileStore(tmp_path / "records", durable=False)
    yield store
    store.close()


@pytest.fixture
def writer(store: FileStore) -> Iterator[WriteBehind]:
    writer = WriteBehind(store)
    yield writer
    writer.close()


def part(value: int, num_bytes: int = SECTOR_BYTES) -> Tensor:
    return torch.full((num_bytes,), value, dtype=torch.uint8)


def read(store: FileStore, key: str) -> Tensor:
    out = aligned_buffer(store.num_bytes(key))
    store.read_into(key, 0, out)
    return out


def test_parts_are_written_in_their_places_with_zeros_between(
    store: FileStore, writer: WriteBehind
) -> None:
    with writer.put("a", 3 * SECTOR_BYTES) as add:
        add(0, part(1, 100), False)
        add(SECTOR_BYTES, part(2, 200), True)
    assert writer.finish() is None
    found = read(store, "a")
    expected = torch.zeros(3 * SECTOR_BYTES, dtype=torch.uint8)
    expected[:100], expected[SECTOR_BYTES : SECTOR_BYTES + 200] = 1, 2
    assert torch.equal(found, expected)


def test_an_error_leaves_no_payload_and_the_next_one_is_written(
    store: FileStore, writer: WriteBehind
) -> None:
    with pytest.raises(KeyError), writer.put("a", 2 * SECTOR_BYTES) as add:
        add(0, part(1), False)
        raise KeyError
    with writer.put("b", SECTOR_BYTES) as add:
        add(0, part(2), False)
    assert writer.finish() is None
    assert not store.has("a") and store.has("b")
    assert writer._waiting_bytes == 0


class FullDisk(FileStore):
    def put(self, key: str, num_bytes: int, parts: Iterable[Tensor]) -> None:
        next(iter(parts))
        raise PlacementError("No space left")


def test_a_full_disk_keeps_nobody_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(behind, "_WAITING_BYTES", SECTOR_BYTES)
    writer = WriteBehind(FullDisk(tmp_path / "full"))
    for _ in range(2):
        with writer.put("a", 4 * SECTOR_BYTES) as add:
            for index in range(4):
                add(index * SECTOR_BYTES, part(index), False)
    assert isinstance(writer.finish(), PlacementError)
    assert writer._waiting_bytes == 0
    writer.close()


class SlowDisk(FileStore):
    """Writes when it may."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, durable=False)
        self.may_write = threading.Event()

    def put(self, key: str, num_bytes: int, parts: Iterable[Tensor]) -> None:
        assert self.may_write.wait(WAIT_SECONDS)
        super().put(key, num_bytes, parts)


def test_what_is_made_waits_for_a_slow_disk_unless_it_stays_in_memory_anyway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(behind, "_WAITING_BYTES", 3 * SECTOR_BYTES)
    store = SlowDisk(tmp_path / "slow")
    writer = WriteBehind(store)
    handed_over: list[int] = []

    def hand_over(stays: bool) -> None:
        with writer.put(f"{int(stays)}", 9 * SECTOR_BYTES) as add:
            for index in range(9):
                add(index * SECTOR_BYTES, part(index), stays)
                handed_over.append(index)

    hand_over(stays=True)
    assert len(handed_over) == 9
    thread = threading.Thread(target=hand_over, args=(False,))
    thread.start()
    thread.join(0.2)
    assert thread.is_alive() and len(handed_over) == 9 + 3
    store.may_write.set()
    thread.join(WAIT_SECONDS)
    assert not thread.is_alive() and writer.finish() is None
    assert store.has("0") and store.has("1")
    writer.close()


def test_later_only_what_takes_memory_is_written_at_once(
    store: FileStore, writer: WriteBehind
) -> None:
    with writer.later():
        with writer.put("a", SECTOR_BYTES) as add:
            add(0, part(1), True)
        with writer.put("b", SECTOR_BYTES) as add:
            add(0, part(2), True)
        assert not writer._written[0].done() and not store.has("a")
        with writer.put("c", SECTOR_BYTES) as add:  # in turn, so all that came before it as well
            add(0, part(3), False)
        writer._written[0].result(WAIT_SECONDS)
        assert store.has("a")
    assert writer.finish() is None
    assert all(store.has(key) for key in "abc")


def test_who_waits_for_all_does_not_wait_until_later(store: FileStore, writer: WriteBehind) -> None:
    with writer.later():
        with writer.put("a", SECTOR_BYTES) as add:
            add(0, part(1), True)
        assert writer.finish() is None
        assert store.has("a")
