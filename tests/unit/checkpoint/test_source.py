import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lib.checkpoint import files
from lib.checkpoint.source import CheckpointSource
from lib.errors import InputError, PlacementError

TENSORS = {
    "transformer.wte.weight": torch.arange(24, dtype=torch.float32).reshape(6, 4),
    "transformer.h.0.experts": torch.arange(24, dtype=torch.bfloat16).reshape(4, 3, 2),
    "transformer.ln.bias": torch.arange(5, dtype=torch.float16),
    "scale": torch.tensor(3.5, dtype=torch.float64),
    "flags": torch.tensor([True, False, True]),
    "nothing": torch.empty(0, 3),
    "codes": torch.arange(4, dtype=torch.uint8).view(torch.float8_e4m3fn),
}
FILE = "model.safetensors"


def same(first: Tensor, second: Tensor) -> bool:
    def flat(tensor: Tensor) -> list[int]:
        return tensor.reshape(-1).view(torch.uint8).tolist() if tensor.numel() else []

    return (
        first.dtype == second.dtype and first.shape == second.shape and flat(first) == flat(second)
    )


def save(folder: Path, tensors: dict[str, Tensor] = TENSORS, name: str = FILE) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / name)
    return folder / name


def save_sharded(folder: Path) -> Path:
    shards = {"a.safetensors": list(TENSORS)[:3], "b.safetensors": list(TENSORS)[3:]}
    for file, names in shards.items():
        save(folder, {name: TENSORS[name] for name in names}, file)
    index = folder / "model.safetensors.index.json"
    weight_map = {name: file for file, names in shards.items() for name in names}
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def write_raw(folder: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / FILE
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


OPENERS: dict[str, Callable[[Path], Path]] = {
    "file": save,
    "folder": lambda folder: save(folder).parent,
    "folder with another name": lambda folder: save(folder, name="unet.safetensors").parent,
    "index": save_sharded,
    "sharded folder": lambda folder: save_sharded(folder).parent,
}


@pytest.mark.parametrize("kind", OPENERS)
def test_tensors_are_read_as_they_were_saved(tmp_path: Path, kind: str) -> None:
    source = CheckpointSource(OPENERS[kind](tmp_path))
    assert set(source.names) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert source.shape(name) == tensor.shape
        assert source.dtype(name) == tensor.dtype
        assert same(source.read(name), tensor)


@pytest.mark.parametrize("name", ["transformer.wte.weight", "transformer.h.0.experts"])
@pytest.mark.parametrize(("start", "end"), [(0, 2), (1, 4), (3, 3), (2, None), (None, 1)])
def test_rows_are_read_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, start: int | None, end: int | None
) -> None:
    source = CheckpointSource(save(tmp_path))
    asked = []
    real = os.preadv

    def count(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        asked.append(sum(len(buffer) for buffer in buffers))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(files.os, "preadv", count)
    rows = source.read(name, start, end)
    assert same(rows, TENSORS[name][start:end])
    assert sum(asked) == rows.numel() * rows.itemsize


@pytest.mark.parametrize(("start", "end"), [(0, 7), (-1, 2), (4, 3), (7, 7)])
def test_rows_that_are_not_there_are_refused(tmp_path: Path, start: int, end: int) -> None:
    source = CheckpointSource(save(tmp_path))
    with pytest.raises(InputError, match=r"'transformer.wte.weight' has rows 0 to 6, not"):
        source.read("transformer.wte.weight", start, end)
    with pytest.raises(InputError, match="'scale' has rows 0 to 0"):
        source.read("scale", 0, 1)


def test_what_is_read_is_the_callers_own(tmp_path: Path) -> None:
    source = CheckpointSource(save(tmp_path))
    source.read("transformer.wte.weight").zero_()
    assert same(source.read("transformer.wte.weight"), TENSORS["transformer.wte.weight"])


def test_names_are_found_with_and_without_the_prefix_and_by_ties(tmp_path: Path) -> None:
    path = save(tmp_path, {"wte.weight": torch.ones(2, 3), "transformer.ln.bias": torch.ones(4)})
    tied = [["lm_head.weight", "transformer.wte.weight"]]
    source = CheckpointSource(path, base_model_prefix="transformer", tied=tied)
    assert source.resolve("transformer.wte.weight") == "wte.weight"
    assert source.resolve("lm_head.weight") == "wte.weight"
    assert source.resolve("ln.bias") == "transformer.ln.bias"
    assert source.identity("lm_head.weight") == source.identity("wte.weight")
    assert "lm_head.weight" in source
    assert "transformer.h.0" not in source
    plain = CheckpointSource(path)
    assert "transformer.wte.weight" not in plain
    with pytest.raises(InputError, match=r"no tensor 'transformer.wte.weight' \(it has 2, such as"):
        plain.read("transformer.wte.weight")


def test_a_name_as_it_is_goes_before_its_spellings(tmp_path: Path) -> None:
    path = save(tmp_path, {"w": torch.zeros(1), "m.w": torch.ones(1), "tied": torch.ones(1) * 2})
    source = CheckpointSource(path, base_model_prefix="m", tied=[["tied", "w", "m.w"]])
    assert [source.read(name).item() for name in ("w", "m.w", "tied")] == [0, 1, 2]


def test_the_identity_is_the_files_and_the_names(tmp_path: Path) -> None:
    path = save(tmp_path)
    first = CheckpointSource(path)
    names = list(TENSORS)
    identities = [first.identity(name) for name in names]
    assert len(set(identities)) == len(names)
    assert all(set(identity) <= set("0123456789abcdef") for identity in identities)
    assert [CheckpointSource(path).identity(name) for name in names] == identities
    os.utime(path, ns=(0, 0))
    assert CheckpointSource(path).identity(names[0]) != identities[0]
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(path.read_bytes())
    assert CheckpointSource(copy).identity(names[0]) != identities[0]


def test_a_file_that_changes_while_it_is_open_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path)
    source = CheckpointSource(path)
    os.link(path, tmp_path / "link")
    assert same(source.read("flags"), TENSORS["flags"])
    os.utime(path, ns=(0, 0))
    with pytest.raises(PlacementError, match=rf"'flags': .*{FILE} has changed"):
        source.read("flags")
    os.truncate(path, 100)
    with pytest.raises(PlacementError, match=rf"'flags': .*{FILE} has changed"):
        source.read("flags")


def test_a_read_error_names_tensor_and_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    source = CheckpointSource(save(tmp_path))
    monkeypatch.setattr(files.os, "preadv", fail)
    with pytest.raises(PlacementError, match=rf"'flags' can't be read from .*{FILE} .Input/output"):
        source.read("flags")


def entry(**changes: Any) -> dict[str, Any]:
    return {"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes}}


BROKEN: dict[str, tuple[Any, bytes, str]] = {
    "truncated data": (entry(), bytes(15), "'w' ends at byte 16 .* 15 are there .truncated"),
    "more data": (entry(), bytes(17), "17 bytes of data, and its header declares 16"),
    "unknown dtype": (entry(dtype="F4"), bytes(16), "'w' has dtype 'F4', and can have .*F32"),
    "dtype no text": (entry(dtype=["F32"]), bytes(16), "declares tensor 'w' as"),
    "wrong size": (entry(shape=[2, 3]), bytes(16), r"'w' F32 \[2, 3\] takes 24 bytes, .* 16"),
    "negative shape": (entry(shape=[-2, -2]), bytes(16), "declares tensor 'w' as"),
    "shape no numbers": (entry(shape=[2.0, 2]), bytes(16), "declares tensor 'w' as"),
    "huge shape": (entry(shape=[2**40, 2**40]), bytes(16), "'w' F32 .* takes 48357"),
    "three offsets": (entry(data_offsets=[0, 8, 16]), bytes(16), "declares tensor 'w' as"),
    "no entry": ({"w": 3}, b"", "declares tensor 'w' as 3"),
    "no JSON": (b"{", b"", "header is not a JSON object"),
    "no object": (b"[]", b"", "header is not a JSON object"),
    "no text": (b"\xff\xff", b"", "header is not a JSON object"),
    "twice": (b'{"w": {}, "w": {}}', b"", "'w' appears twice"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_refused(tmp_path: Path, what: str) -> None:
    header, data, message = BROKEN[what]
    with pytest.raises(InputError, match=rf"checkpoint file .*{FILE}.*{message}"):
        CheckpointSource(write_raw(tmp_path, header, data))


@pytest.mark.parametrize("length", [0, 5, 8, 20])
def test_a_file_that_ends_in_its_header_is_refused(tmp_path: Path, length: int) -> None:
    path = save(tmp_path)
    os.truncate(path, length)
    with pytest.raises(InputError, match=rf"{FILE} is damaged .*the file has {length}"):
        CheckpointSource(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index["weight_map"].update(flags="a.safetensors"), "'flags' is in a.safet"),
        (lambda index: index["weight_map"].update(w="../b.safetensors"), "beside the index"),
        (lambda index: index["weight_map"].update(w=3), "beside the index"),
        (lambda index: index["weight_map"].update(w="c.safetensors"), "c.safetensors can't be op"),
        (lambda index: index.update(weight_map=[]), "beside the index"),
        (lambda index: index.clear(), "beside the index"),
    ],
)
def test_a_wrong_index_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    path = save_sharded(tmp_path)
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises(InputError, match=message):
        CheckpointSource(tmp_path)


def test_names_outside_the_index_are_not_there(tmp_path: Path) -> None:
    path = save_sharded(tmp_path)
    index = json.loads(path.read_text())
    del index["weight_map"]["flags"]
    path.write_text(json.dumps(index))
    source = CheckpointSource(tmp_path)
    assert "flags" not in source
    with pytest.raises(InputError, match="no tensor 'flags'"):
        source.read("flags")


def test_torch_checkpoints_are_refused_with_the_conversion(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({}, path)
    for place in (path, tmp_path):
        with pytest.raises(InputError, match="safe_serialization=True"):
            CheckpointSource(place)


def test_folders_without_one_checkpoint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a .safetensors file"):
        CheckpointSource(tmp_path)
    with pytest.raises(InputError, match="there is no such file"):
        CheckpointSource(tmp_path / "missing")
    with pytest.raises(InputError, match=r"missing.safetensors can't be opened \(No such file"):
        CheckpointSource(tmp_path / "missing.safetensors")
    for name in ("a.safetensors", "b.safetensors"):
        save(tmp_path, name=name)
    with pytest.raises(InputError, match=r"several checkpoints \(a.safetensors, b.safetensors\)"):
        CheckpointSource(tmp_path)


def test_an_open_checkpoint_keeps_no_more_than_its_files(tmp_path: Path) -> None:
    def count_open() -> int:
        links = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
        return sum(str(tmp_path) in os.readlink(link) for link in links if link.is_symlink())

    source = CheckpointSource(save_sharded(tmp_path))
    assert count_open() == 2
    del source
    assert count_open() == 0
