"""What tests of stores share: a payload of three chunks, and ways to read and damage it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lib.errors import PlacementError
from lib.tiering.stores import CHUNK_BYTES, NumaStore, Store, aligned_buffer, memory_nodes, numa
from lib.units import SECTOR_BYTES

SIZE = 2 * CHUNK_BYTES + 3 * SECTOR_BYTES
"""Three chunks, the last one short."""
KEY, OTHER = "00ab", "00cd"


def payload(num_bytes: int = SIZE, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator)


def read(store: Store, key: str = KEY, start: int = 0, end: int | None = None) -> Tensor:
    out = aligned_buffer((store.num_bytes(key) if end is None else end) - start)
    store.read_into(key, start, out)
    return out


def block_path(folder: Path, key: str = KEY) -> Path:
    return folder / f"{key}.block"


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as opened:
        opened.seek(position)
        (byte,) = opened.read(1)
        opened.seek(position)
        opened.write(bytes([byte ^ 1]))


def only_node_store(monkeypatch: pytest.MonkeyPatch) -> NumaStore:
    """Return a store on this machine's first node, which need not be far nor one of several."""
    try:
        numa.page_nodes(aligned_buffer(SECTOR_BYTES))
    except PlacementError as error:
        pytest.skip(str(error))
    node = memory_nodes()[0]
    with monkeypatch.context() as patch:
        patch.setattr(numa, "memory_nodes", lambda: [node, node + 1])
        return NumaStore(node)
