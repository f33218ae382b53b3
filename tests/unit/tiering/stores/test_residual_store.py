"""The store of residuals: payloads come back through records that fast memory has."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lib.codecs.native import load_native
from lib.codecs.records import Codec, encode
from lib.codecs.residuals import KnownRows, Residuals
from lib.errors import PlacementError
from lib.tiering.stores import CHUNK_BYTES, FileStore, ResidualStore, StoreOptions, aligned_buffer
from lib.vocabulary import Precision

pytestmark = pytest.mark.skipif(load_native().library is None, reason="the extension isn't there")
KEY, OTHER = "ab", "cd"


class KnownOne:
    """Knows the weights under KEY."""

    def __init__(self, weights: Tensor) -> None:
        codec = Codec(Precision.INT8, 0)
        self.rows = KnownRows(
            offset=0,
            start=0,
            end=len(weights),
            dtype=weights.dtype,
            layout=codec.layout(*weights.shape),
            record=encode(weights, codec),
        )

    def find(self, key: str) -> Residuals | None:
        return Residuals([self.rows]) if key == KEY else None


@pytest.fixture
def payload() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(1600, 1024, generator=generator).bfloat16()
    return weights.view(torch.uint8).view(-1)  # 12.5 chunks


def make_store(folder: Path, payload: Tensor) -> tuple[ResidualStore, KnownOne]:
    known = KnownOne(payload.view(torch.bfloat16).view(-1, 1024))
    options = StoreOptions(device=torch.device("cpu"), folder=folder, known=known)
    return ResidualStore.open(options), known


def read(store: ResidualStore, key: str, start: int, size: int) -> Tensor:
    out = aligned_buffer(size)
    store.read_into(key, start, out)
    return out


def only_file(folder: Path) -> Path:
    (path,) = folder.glob("*.block")
    return path


def test_it_reads_what_was_put_from_a_quarter_of_the_bytes(tmp_path: Path, payload: Tensor) -> None:
    store, _ = make_store(tmp_path, payload)
    assert not store.has(KEY)
    store.put(KEY, len(payload), [payload[:5000], payload[5000:]])
    assert store.has(KEY) and store.num_bytes(KEY) == len(payload)
    assert only_file(tmp_path).stat().st_size < 0.3 * len(payload)
    assert torch.equal(read(store, KEY, 0, len(payload)), payload)
    middle = slice(3 * CHUNK_BYTES, 9 * CHUNK_BYTES)
    assert torch.equal(read(store, KEY, middle.start, 6 * CHUNK_BYTES), payload[middle])
    last = 12 * CHUNK_BYTES
    assert torch.equal(read(store, KEY, last, len(payload) - last), payload[last:])


def test_another_run_finds_the_file(tmp_path: Path, payload: Tensor) -> None:
    make_store(tmp_path, payload)[0].put(KEY, len(payload), [payload])
    written = only_file(tmp_path).stat().st_mtime_ns
    store, _ = make_store(tmp_path, payload)
    store.put(KEY, len(payload), [])
    assert only_file(tmp_path).stat().st_mtime_ns == written
    assert torch.equal(read(store, KEY, 0, len(payload)), payload)


def test_what_isnt_known_is_stored_as_it_is(tmp_path: Path, payload: Tensor) -> None:
    store, _ = make_store(tmp_path, payload)
    store.put(OTHER, len(payload), [payload])
    assert torch.equal(read(store, OTHER, 0, len(payload)), payload)
    assert FileStore(tmp_path).has(OTHER)


def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path, payload: Tensor) -> None:
    store, _ = make_store(tmp_path, payload)
    store.put(KEY, len(payload), [payload])
    path = only_file(tmp_path)
    whole = path.read_bytes()
    for place in range(3 * 4096, len(whole) - 4096, len(whole) // 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        damaged, _ = make_store(tmp_path, payload)
        with pytest.raises(PlacementError, match=path.name):
            read(damaged, KEY, 0, len(payload))
    path.write_bytes(whole[:-4096])
    damaged, _ = make_store(tmp_path, payload)
    with pytest.raises(PlacementError, match="truncated"):
        read(damaged, KEY, 0, len(payload))


def test_a_file_with_a_damaged_head_is_written_anew(tmp_path: Path, payload: Tensor) -> None:
    make_store(tmp_path, payload)[0].put(KEY, len(payload), [payload])
    path = only_file(tmp_path)
    whole = path.read_bytes()
    for place in (100, 2 * 4096 + 5):  # of the block file, and of the residuals in it
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        store, _ = make_store(tmp_path, payload)
        store.put(KEY, len(payload), [payload])
        assert torch.equal(read(store, KEY, 0, len(payload)), payload)


def test_a_record_that_changed_in_memory_is_noticed(tmp_path: Path, payload: Tensor) -> None:
    store, known = make_store(tmp_path, payload)
    store.put(KEY, len(payload), [payload])
    known.rows.record[len(known.rows.record) // 2] ^= 0xF0
    with pytest.raises(PlacementError, match="checksums"):
        read(store, KEY, 0, len(payload))


def test_other_records_are_another_way_to_code(payload: Tensor) -> None:
    weights = payload.view(torch.bfloat16).view(-1, 1024)
    ways = [Residuals([KnownOne(each).rows]).identity for each in (weights, weights, -weights)]
    assert ways[0] == ways[1] != ways[2]
