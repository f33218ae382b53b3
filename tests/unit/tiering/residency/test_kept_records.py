"""Compressed weights of a checkpoint are kept for the next load, which reads nothing else."""

import errno
import warnings
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from smallest_budget import smallest
from torch import Tensor, nn

from lib.checkpoint.source import CheckpointSource
from lib.codecs.native import load_native
from lib.errors import InputError
from lib.tiering import attach, empty_weights
from lib.tiering.residency import weights
from lib.tiering.stores import file

IDS = torch.arange(6)
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    load_native()  # while its cache is the user's
    monkeypatch.delenv("TIERHINTS_RECORDS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    save(folder)
    return folder


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(300, 256),
        nn.Linear(256, 256),
        nn.LayerNorm(256),
        nn.Linear(256, 256, bias=False),
    )


def empty() -> nn.Module:
    with empty_weights():
        return build()


def save(folder: Path, factor: float = 1.0) -> None:
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= factor
    save_file(model.state_dict(), folder / "model.safetensors")


def compute(checkpoint: Path, precision: str | None = "int4", **options: Any) -> Tensor:
    """Load, and compute once."""
    options.setdefault("budget", {"HBM": None})
    with torch.no_grad():
        with attach(model := empty(), weights=checkpoint, precision=precision, **options):
            return model(IDS).clone()


def files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.rglob("*.block")}


@pytest.fixture
def read_from_it(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what is read of the checkpoint from then on."""
    names: list[str] = []
    read = CheckpointSource.read

    def noted(self: CheckpointSource, name: str, *rows: Any) -> Tensor:
        names.append(name)
        return read(self, name, *rows)

    monkeypatch.setattr(CheckpointSource, "read", noted)
    return names


@pytest.mark.parametrize("where", ["fast memory", "streamed", "emulated"])
def test_the_next_load_reads_records_only(
    where: str, checkpoint: Path, read_from_it: list[str]
) -> None:
    options: dict[str, Any] = {}
    if where == "streamed":
        least = smallest(empty(), "int4", weights=checkpoint)
        options = {"budget": {"HBM": least, "SSD": None}}
    elif where == "emulated":
        options = {"mode": "emulated"}
    first = compute(checkpoint, **options)
    kept = files(checkpoint / ".tierhints")
    assert kept and "1.weight" in read_from_it
    read_from_it.clear()
    assert torch.equal(compute(checkpoint, **options), first)
    assert set(read_from_it) == {"2.weight", "2.bias"}  # which isn't compressed
    assert files(checkpoint / ".tierhints") == kept
    # Of another precision nothing is there.
    compute(checkpoint, "int8")
    assert "1.weight" in read_from_it
    # And lossless weights need none.
    before = files(checkpoint / ".tierhints")
    compute(checkpoint, None)
    assert files(checkpoint / ".tierhints") == before


def test_records_of_a_checkpoint_that_has_changed_are_not_used(checkpoint: Path) -> None:
    before = compute(checkpoint)
    save(checkpoint, factor=2)
    after = compute(checkpoint)
    assert not torch.equal(after, before)
    assert torch.equal(compute(checkpoint), after)


def test_damaged_records_are_made_anew(checkpoint: Path) -> None:
    expected = compute(checkpoint)
    for path in (checkpoint / ".tierhints").glob("*.block"):
        data = bytearray(path.read_bytes())
        data[-4096] ^= 1  # of the payload: the header is sound
        path.write_bytes(data)
    with pytest.warns(UserWarning, match="fails its checksum .*; they are made anew"):
        assert torch.equal(compute(checkpoint), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):  # the second one reads what the first has written
            assert torch.equal(compute(checkpoint), expected)


def no_room(*arguments: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("module", "name", "fault", "reason"),
    [
        (file.shutil, "disk_usage", lambda folder: Usage(0, 0, 2**30), "1.0 GiB are left to"),
        (file, "_write_all", no_room, "No space left"),
    ],
    ids=["nearly", "while it is written to"],
)
def test_a_full_disk_gets_none(
    module: Any, name: str, fault: Any, reason: str, checkpoint: Path, monkeypatch: Any
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, name, fault)
        with pytest.warns(UserWarning, match=f"not kept for the next load.*{reason}") as said:
            first = compute(checkpoint)
    assert len(said) == 1
    assert not files(checkpoint)
    assert torch.equal(compute(checkpoint), first)
    assert files(checkpoint)


def test_where_they_are_kept(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkpoint / ".tierhints").write_text("not a folder, as in one that can't be written")
    first = compute(checkpoint)
    assert files(tmp_path / "cache" / "tierhints" / "records")
    monkeypatch.setenv("TIERHINTS_RECORDS", str(tmp_path / "mine"))
    assert torch.equal(compute(checkpoint / "model.safetensors"), first)
    assert files(tmp_path / "mine")
    (checkpoint / ".tierhints").unlink()
    compute(checkpoint, spill_dir=tmp_path / "spill")
    monkeypatch.setenv("TIERHINTS_RECORDS", "")
    compute(checkpoint)
    assert not (checkpoint / ".tierhints").exists()
    monkeypatch.setenv("TIERHINTS_RECORDS", str(checkpoint / "model.safetensors"))
    with pytest.warns(UserWarning, match="not kept for the next load"):
        assert torch.equal(compute(checkpoint), first)


def test_they_take_no_more_room_than_the_checkpoint(checkpoint: Path) -> None:
    size = (checkpoint / "model.safetensors").stat().st_size
    compute(checkpoint, "int4")
    first = files(checkpoint / ".tierhints")
    for precision in ("int8", "int6", "int5"):
        compute(checkpoint, precision)
    others = set(files(checkpoint / ".tierhints"))
    compute(checkpoint, "int3")
    last = files(checkpoint / ".tierhints")
    paths = (checkpoint / ".tierhints").glob("*.block")
    assert sum(path.stat().st_size for path in paths) <= size
    assert set(first) - set(last) and len(set(last) - others) == 3


def test_weights_that_cannot_be_encoded_are_named(checkpoint: Path) -> None:
    save(checkpoint, factor=float("inf"))
    with pytest.raises(InputError, match=r"NaN, infinite or too large"):
        compute(checkpoint)
    assert not files(checkpoint)


def test_a_load_that_fails_half_way_leaves_whole_files_only(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(weights, "prepare", fail)
        with pytest.raises(MemoryError):
            compute(checkpoint)
    assert not list((checkpoint / ".tierhints").glob(".*.partial"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = compute(checkpoint)
        assert torch.equal(compute(checkpoint), first)
