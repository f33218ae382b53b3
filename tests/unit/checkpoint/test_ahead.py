"""Reading ahead: what is asked for is what the files have, in whichever order it is asked for."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lib.checkpoint import ahead, source
from lib.checkpoint.files import File
from lib.checkpoint.source import CheckpointSource
from lib.errors import PlacementError

Tensors = dict[str, Tensor]


@pytest.fixture
def tensors() -> Tensors:
    torch.manual_seed(0)
    return {
        "first": torch.randn(100, 10),
        "odd": torch.randint(0, 255, (7, 3), dtype=torch.uint8),
        "second": torch.randn(3000, 10),
        "vector": torch.randn(33),
        "half": torch.randn(50, 8).bfloat16(),
        "empty": torch.randn(0, 8),
    }


@pytest.fixture
def opened(
    tensors: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[CheckpointSource]:
    """With pieces of 400 bytes, so that buffers are used many times."""
    monkeypatch.setattr(source, "_PIECE_BYTES", 400)
    save_file(tensors, tmp_path / "model.safetensors")
    yield CheckpointSource(tmp_path)
    assert not [each for each in threading.enumerate() if each.name == "tierhints-ahead"]


def test_whole_tensors_and_rows_are_those_of_the_file(
    tensors: Tensors, opened: CheckpointSource
) -> None:
    with opened.reading_ahead(tensors):
        for name, tensor in tensors.items():
            if tensor.dim() == 1 or name == "odd":
                assert torch.equal(opened.read(name), tensor)
                continue
            for start in range(0, len(tensor), 7):  # some lie in two pieces
                end = min(start + 7, len(tensor))
                assert torch.equal(opened.read(name, start, end), tensor[start:end])
    assert torch.equal(opened.read("first"), tensors["first"])


def test_a_whole_tensor_is_in_memory_of_its_own(tensors: Tensors, opened: CheckpointSource) -> None:
    with opened.reading_ahead(["first", "second"]):
        first = opened.read("first")
        opened.read("second")
    assert torch.equal(first, tensors["first"])
    assert first.untyped_storage().nbytes() == first.numel() * 4


def test_what_is_left_out_asked_for_again_or_not_expected_is_read_all_the_same(
    tensors: Tensors, opened: CheckpointSource
) -> None:
    with opened.reading_ahead(["first", "second", "half"]):
        for name in ("second", "first", "vector", "half", "second", "half", "first"):
            assert torch.equal(opened.read(name), tensors[name]), name


def test_what_nobody_asks_for_keeps_nobody(opened: CheckpointSource) -> None:
    with opened.reading_ahead(["second"]):
        pass
    with pytest.raises(KeyboardInterrupt), opened.reading_ahead(["second"]):
        opened.read("second", 0, 3)
        raise KeyboardInterrupt


def test_a_file_that_changes_is_refused_where_it_is_read(
    tensors: Tensors, opened: CheckpointSource, tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "other.safetensors")
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with (
        pytest.raises(PlacementError, match="'first'.*has changed since"),
        opened.reading_ahead(["first", "second"]),
    ):
        opened.read("first")


def test_only_a_few_pieces_are_read_before_they_are_asked_for(
    opened: CheckpointSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[int] = []
    full, further = threading.Event(), threading.Event()
    read = File.read_pages

    def note(self: File, start: int, num_bytes: int, pages: memoryview, name: str) -> memoryview:
        places.append(start)
        if len(places) >= ahead._NUM_BUFFERS:
            full.set()
        if len(places) >= ahead._NUM_BUFFERS + 3:
            further.set()
        return read(self, start, num_bytes, pages, name)

    monkeypatch.setattr(File, "read_pages", note)
    with opened.reading_ahead(["second"]):
        assert full.wait(10)
        assert len(places) == ahead._NUM_BUFFERS
        opened.read("second", 0, 30)
        opened.read("second", 30, 40)  # the fourth piece
        assert further.wait(10)


def test_a_file_system_without_direct_reads_serves_too(
    tensors: Tensors, opened: CheckpointSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("os.O_DIRECT")
    with opened.reading_ahead(tensors):
        for name, tensor in tensors.items():
            assert torch.equal(opened.read(name), tensor)
