"""One suite for every registered store, those of ``$TIERHINTS_PLUGINS`` among them."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from byte_payloads import KEY, OTHER, SIZE, only_node_store, payload, read
from torch import Tensor

from lib.codecs.native import load_native
from lib.codecs.residuals import Residuals
from lib.errors import InputError, PlacementError
from lib.tiering.stores import (
    CHUNK_BYTES,
    PIECE_BYTES,
    STORES,
    DeviceStore,
    FileStore,
    HostStore,
    MemoryStore,
    ResidualStore,
    Store,
    StoreOptions,
    aligned_buffer,
    file,
    register_store,
    served_tiers,
)
from lib.units import SECTOR_BYTES
from lib.vocabulary import Tier


class KnownAll:
    """Has residuals of all payloads, in which no weights are known."""

    def find(self, key: str) -> Residuals:
        return Residuals([])


@pytest.fixture(params=[*STORES, "HBM", "SSD, page cache", "SSD, residuals"])
def store(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Store]:
    made: Store
    options = StoreOptions(device=torch.device("cpu"), folder=tmp_path)
    if request.param == "HBM":
        made = DeviceStore.open(options)
    elif request.param == "SSD, page cache":
        monkeypatch.setattr(file, "accepts_direct_io", lambda _: False)
        with pytest.warns(UserWarning, match="no direct reads"):
            made = FileStore.open(options)
    elif request.param == "SSD, residuals":
        if load_native().library is None:
            pytest.skip("the extension isn't there")
        known = StoreOptions(device=options.device, folder=tmp_path, known=KnownAll())
        made = ResidualStore.open(known)
    elif request.param == "CXL":
        made = only_node_store(monkeypatch)
    else:
        made = STORES[request.param].open(options)
    yield made
    made.close()


def test_bytes_come_back_exactly(store: Store) -> None:
    data = payload()
    assert not store.has(KEY)
    store.put(KEY, SIZE, [data[:7], data[7:7], data[7:CHUNK_BYTES], data[CHUNK_BYTES:]])
    assert store.has(KEY)
    assert store.num_bytes(KEY) == SIZE
    assert torch.equal(read(store), data)
    view = store.view(KEY)
    assert view is not None or not isinstance(store, MemoryStore)
    assert view is None or store.tier is not Tier.SSD
    assert view is None or torch.equal(view, data)


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (0, CHUNK_BYTES),
        (CHUNK_BYTES, 2 * CHUNK_BYTES),
        (0, 2 * CHUNK_BYTES),
        (CHUNK_BYTES, SIZE),
        (2 * CHUNK_BYTES, SIZE),
    ],
)
def test_parts_are_read_by_chunks_and_to_the_end(store: Store, start: int, end: int) -> None:
    data = payload()
    store.put(KEY, SIZE, [data])
    assert torch.equal(read(store, start=start, end=end), data[start:end])


def test_a_part_of_a_chunk_cannot_be_checked_and_is_no_read(store: Store) -> None:
    store.put(KEY, SIZE, [payload()])
    for start, end in [(SECTOR_BYTES, CHUNK_BYTES), (0, SECTOR_BYTES), (0, SIZE + CHUNK_BYTES)]:
        with pytest.raises(AssertionError):
            read(store, start=start, end=end)


@pytest.mark.parametrize("num_bytes", [SECTOR_BYTES, CHUNK_BYTES, PIECE_BYTES + CHUNK_BYTES])
def test_payloads_of_one_sector_one_chunk_and_several_pieces(store: Store, num_bytes: int) -> None:
    data = payload(num_bytes)
    store.put(KEY, num_bytes, [data])
    assert torch.equal(read(store), data)


def test_a_store_keeps_a_copy(store: Store) -> None:
    data = payload()
    store.put(KEY, SIZE, [data])
    expected = data.clone()
    data.zero_()
    assert torch.equal(read(store), expected)


def test_payloads_do_not_mix(store: Store) -> None:
    store.put(KEY, SIZE, [payload(seed=1)])
    store.put(OTHER, SIZE, [payload(seed=2)])
    assert torch.equal(read(store, KEY), payload(seed=1))
    assert torch.equal(read(store, OTHER), payload(seed=2))


def test_what_is_held_is_not_made_again(store: Store) -> None:
    def parts() -> Iterator[Tensor]:
        pytest.fail("the parts were asked for")
        yield payload()

    store.put(KEY, SIZE, [payload()])
    store.put(KEY, SIZE, parts())
    assert torch.equal(read(store), payload())


def test_parts_that_fail_leave_nothing(store: Store, tmp_path: Path) -> None:
    def parts() -> Iterator[Tensor]:
        yield payload()[:CHUNK_BYTES]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.put(KEY, SIZE, parts())
    with pytest.raises(AssertionError):
        store.put(KEY, SIZE, [payload()[:CHUNK_BYTES]])
    assert not store.has(KEY)
    assert list(tmp_path.iterdir()) == []
    store.put(KEY, SIZE, [payload()])
    assert torch.equal(read(store), payload())


def test_an_unknown_key_is_refused(store: Store) -> None:
    for ask in (lambda: read(store), lambda: store.num_bytes(KEY)):
        with pytest.raises(PlacementError, match=f"payload {KEY} .*load the model again"):
            ask()
    store.free(KEY)


def test_a_closed_store_is_refused(store: Store) -> None:
    store.put(KEY, SIZE, [payload()])
    store.close()
    store.close()
    assert not store.has(KEY)
    with pytest.raises(PlacementError, match="its store is closed"):
        store.read_into(KEY, 0, aligned_buffer(SIZE))
    with pytest.raises(PlacementError, match="its store is closed"):
        store.put(KEY, SIZE, [payload()])


def test_more_than_there_is_room_for_is_refused(store: Store) -> None:
    room = store.capacity_bytes()
    assert room > 0
    with pytest.raises(PlacementError, match=rf"payload {KEY}.*1024.0 TiB"):
        store.put(KEY, 2**50, [])
    assert not store.has(KEY)


def test_threads_read_at_the_same_time(store: Store) -> None:
    data = payload(8 * CHUNK_BYTES)
    store.put(KEY, len(data), [data])
    out = aligned_buffer(len(data))

    def read_chunk(start: int) -> None:
        store.read_into(KEY, start, out[start : start + CHUNK_BYTES])

    with ThreadPoolExecutor(4) as threads:
        for _ in range(10):
            out.zero_()
            list(threads.map(read_chunk, range(0, len(data), CHUNK_BYTES)))
            assert torch.equal(out, data)


def test_freed_memory_is_gone_and_freed_files_of_a_lasting_folder_stay(tmp_path: Path) -> None:
    host, lasting, temporary = (
        HostStore(pinned=False),
        FileStore(tmp_path / "a"),
        FileStore(tmp_path / "b", temporary=True),
    )
    for store in (host, lasting, temporary):
        store.put(KEY, SIZE, [payload()])
        store.free(KEY)
    assert [host.has(KEY), lasting.has(KEY), temporary.has(KEY)] == [False, True, False]


def test_a_tier_has_one_store_and_real_mode_serves_the_tiers_that_have_one() -> None:
    assert served_tiers() == {Tier.HBM, Tier.CPU, Tier.CXL, Tier.SSD}
    with STORES.restored():

        @register_store
        class PeerStore(HostStore):
            tier = Tier.PEER

        assert served_tiers() >= {Tier.PEER} and STORES["PEER"] is PeerStore
        with pytest.raises(InputError, match="store of tier 'PEER' is registered already"):

            @register_store
            class OtherStore(HostStore):
                tier = Tier.PEER

    with pytest.raises(InputError, match="no store of tier 'PEER'; there are: CPU, SSD, CXL"):
        STORES["PEER"]


def test_aligned_buffers_start_on_a_page_and_outlive_their_first_name() -> None:
    buffer = aligned_buffer(5000)
    assert buffer.data_ptr() % SECTOR_BYTES == 0
    assert buffer.sum() == 0
    tail = buffer[4096:]
    del buffer
    tail.fill_(7)
    assert tail.sum() == 904 * 7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_pinned_memory_is_registered_and_given_back() -> None:
    store = HostStore(pinned=True)
    store.put(KEY, SIZE, [payload()])
    view = store.view(KEY)
    assert view.is_pinned()
    assert torch.equal(view.cuda(non_blocking=True).cpu(), payload())
    store.free(KEY)
    assert not view.is_pinned()
    store.put(KEY, SIZE, [payload()])
    store.close()
