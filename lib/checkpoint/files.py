"""The files of a safetensors checkpoint: one, or several and their index.

A safetensors file is 8 bytes of header length (little-endian), a JSON header ``{name: {"dtype",
"shape", "data_offsets": [start, end]}}``, and the data, to which the offsets refer
(https://github.com/huggingface/safetensors#format). Only headers are read when a checkpoint is
opened. Nothing is mapped: mapped pages stay in memory as the kernel likes, and count.
"""

import math
import os
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from ..errors import InputError, PlacementError
from ..files import drop_cached_pages, open_past_cache, parse_json
from ..units import SECTOR_BYTES

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
PLAIN_DTYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
"""Weights as they are; whatever else stands for a weight is a code, worth nothing without its
scale.
"""
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""
_INDEX_SUFFIX = ".safetensors.index.json"
_TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".bin.index.json")


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor in a file, by its place in the data."""

    file: "File"
    dtype: torch.dtype
    shape: torch.Size
    start: int

    @property
    def num_bytes(self) -> int:
        """Bytes of its data."""
        return self.shape.numel() * self.dtype.itemsize

    @property
    def identity(self) -> str:
        """Another one as soon as the file was written to."""
        return f"{self.file.identity}@{self.start}"

    def read(self, first: int, out: Tensor, name: str) -> None:
        """Fill a contiguous tensor with rows from the first one on."""
        start = self.start + first * math.prod(self.shape[1:]) * self.dtype.itemsize
        flat = out.reshape(-1).view(torch.uint8)
        self.file.read_into(start, memoryview(flat.numpy()), name)  # type: ignore[arg-type]

    def extents(self, start: int, end: int) -> "Iterator[Extent]":
        """Yield where elements [start, end) lie, in row-major order."""
        size = self.dtype.itemsize
        yield Extent(self.file, self.start + start * size, (end - start) * size)


@dataclass(frozen=True, slots=True)
class Extent:
    """A range of bytes in a file's data."""

    file: "File"
    start: int
    num_bytes: int

    def part(self, start: int, num_bytes: int) -> "Extent":
        """Return some bytes of it, from ``start`` on."""
        return Extent(self.file, self.start + start, num_bytes)

    def cut(self, num_bytes: int) -> "Iterator[Extent]":
        """Yield its bytes in parts of so many; the last one may be smaller."""
        for start in range(0, self.num_bytes, num_bytes):
            yield self.part(start, min(num_bytes, self.num_bytes - start))

    def announce(self) -> None:
        """Let the system begin to read it, and nothing beyond."""
        self.file.announce(self.start, self.num_bytes)

    def read_into(self, out: memoryview, name: str) -> None:
        """Fill ``out``, of as many bytes."""
        self.file.read_into(self.start, out, name)

    def read_pages(self, pages: memoryview, name: str) -> memoryview:
        """Return its bytes, read into pages of the caller's: room for two sectors more."""
        return self.file.read_pages(self.start, self.num_bytes, pages, name)


class File:
    """One safetensors file, open for as long as something refers to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise InputError(
                f"checkpoint file {path} can't be opened ({error.strerror}): give a whole one"
            ) from error
        weakref.finalize(self, os.close, self._descriptor).atexit = False
        self._stamp = self._stat()
        size = self._stamp[2]
        length = int.from_bytes(self._read_start(0, _LENGTH_BYTES), "little")
        self._data_start = _LENGTH_BYTES + length
        if size < _LENGTH_BYTES or length > min(_MAX_HEADER_BYTES, size - _LENGTH_BYTES):
            raise self._broken(f"its header would have {length} bytes, and the file has {size}")
        self._header = self._read_start(_LENGTH_BYTES, length)
        # Without the device, whose number may be another after a restart.
        self.identity = f"{self._stamp[1:]}{xxhash.xxh3_128_hexdigest(self._header)}"

    def entries(self) -> dict[str, Entry]:
        """Return the tensors that the header declares, checked against the file's size."""
        try:
            header = parse_json(self._header.decode("utf-8"))
            if not isinstance(header, dict):
                raise InputError("it is not an object")
        except (UnicodeDecodeError, InputError) as error:
            raise self._broken(f"its header is not a JSON object: {error}") from error
        data_bytes = self._stamp[2] - self._data_start
        parsed = {
            name: self._parse_entry(name, declared, data_bytes)
            for name, declared in header.items()
            if name != "__metadata__"
        }
        end = max((entry.start + entry.num_bytes for entry in parsed.values()), default=0)
        if end != data_bytes:
            raise self._broken(f"it has {data_bytes} bytes of data, and its header declares {end}")
        return parsed

    def announce(self, start: int, num_bytes: int) -> None:
        """Let the system begin to read these bytes of the data, and none beyond."""
        if hasattr(os, "posix_fadvise"):
            offset = self._data_start + start
            os.posix_fadvise(self._descriptor, offset, num_bytes, os.POSIX_FADV_WILLNEED)

    def read_into(self, start: int, out: memoryview, name: str) -> None:
        """Fill ``out`` from a position in the data."""
        offset, filled = self._data_start + start, 0
        with self._explained(name):
            while filled < len(out):
                count = os.preadv(self._descriptor, [out[filled:]], offset + filled)
                if count == 0:
                    raise self._changed(name)
                filled += count
            drop_cached_pages(self._descriptor, offset, len(out))

    def read_pages(self, start: int, num_bytes: int, pages: memoryview, name: str) -> memoryview:
        """Return bytes of the data, read into ``pages`` with the whole pages that they lie in,
        past the page cache where the file system can.
        """
        offset = self._data_start + start
        skipped = offset % SECTOR_BYTES
        first, wanted, filled = offset - skipped, skipped + num_bytes, 0
        pages = pages[: -(-wanted // SECTOR_BYTES) * SECTOR_BYTES]
        with self._explained(name):
            while filled < wanted:
                count = os.preadv(self._past_cache, [pages[filled:]], first + filled)
                filled += count
                if filled < wanted and (not count or filled % SECTOR_BYTES):
                    raise self._changed(name)
            drop_cached_pages(self._descriptor, first, wanted)
        return pages[skipped:wanted]

    @cached_property
    def _past_cache(self) -> int:
        """A descriptor that reads past the page cache; the other one where there is no such way."""
        descriptor = open_past_cache(self.path)
        if descriptor is None:
            return self._descriptor
        weakref.finalize(self, os.close, descriptor).atexit = False
        return descriptor

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        """Turn what the disk says into an error with the way out; the file must be the same."""
        try:
            yield
            changed = self._stat()[:-1] != self._stamp[:-1]  # a new link to it changes its ctime
        except OSError as error:
            raise PlacementError(
                f"tensor {name!r} can't be read from {self.path} ({error.strerror}): give a "
                "checkpoint on a sound disk"
            ) from error
        if changed:
            raise self._changed(name)

    def _changed(self, name: str) -> PlacementError:
        return PlacementError(
            f"tensor {name!r}: {self.path} has changed since the checkpoint was opened; load "
            "the model again"
        )

    def _parse_entry(self, name: str, declared: Any, data_bytes: int) -> Entry:
        try:
            kind, sizes = declared["dtype"], declared["shape"]
            start, end = declared["data_offsets"]
            numbers = [*sizes, start, end]
            sound = isinstance(kind, str) and all(
                type(number) is int and 0 <= number < 2**63 for number in numbers
            )
        except (KeyError, TypeError, ValueError):
            sound = False
        if not sound:
            raise self._broken(f"its header declares tensor {name!r} as {declared!r:.200}")
        if kind not in _DTYPES:
            raise InputError(
                f"checkpoint file {self.path}: tensor {name!r} has dtype {kind!r}, and can have "
                f"{', '.join(_DTYPES)}: convert it"
            )
        dtype = _DTYPES[kind]
        num_bytes = math.prod(sizes) * dtype.itemsize
        if end - start != num_bytes:
            raise self._broken(
                f"tensor {name!r} {kind} {sizes} takes {num_bytes} bytes, and the header gives it "
                f"{end - start}"
            )
        if end > data_bytes:
            raise self._broken(
                f"tensor {name!r} ends at byte {end} of the data, of which {data_bytes} are there "
                "(truncated)"
            )
        return Entry(self, dtype, torch.Size(sizes), start)

    def _read_start(self, offset: int, length: int) -> bytes:
        try:
            return os.pread(self._descriptor, length, offset)
        except OSError as error:
            raise InputError(
                f"checkpoint file {self.path} can't be read ({error.strerror}): give a whole one"
            ) from error

    def _stat(self) -> tuple[int, ...]:
        stat = os.fstat(self._descriptor)
        return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)

    def _broken(self, reason: str) -> InputError:
        return InputError(
            f"checkpoint file {self.path} is damaged or not a safetensors file: {reason}; "
            "download or save it again"
        )


def open_files(path: Path) -> dict[str, Entry]:
    """Return the tensors of a checkpoint: a folder, a file or an index. Files stay open for as long
    as something refers to one of their tensors.
    """
    file = _find_file(path)
    if not file.name.endswith(".json"):
        return File(file).entries()
    weight_map = _load_index(file)
    entries: dict[str, Entry] = {}
    for shard in sorted(set(weight_map.values())):
        declared = File(file.parent / shard).entries()
        for name in (name for name, holder in weight_map.items() if holder == shard):
            if name not in declared:
                raise InputError(
                    f"index {file} says that tensor {name!r} is in {shard}, where it is not: "
                    "download or save the checkpoint again"
                )
            entries[name] = declared[name]
    return entries


def _find_file(path: Path) -> Path:
    """Return the file, or the index, that a path means; a folder has one."""
    if not path.is_dir():
        if path.suffix == ".safetensors" or path.name.endswith(_INDEX_SUFFIX):
            return path
        raise _other_kind(path)
    for name in ("model.safetensors", f"model{_INDEX_SUFFIX}"):
        if (path / name).exists():
            return path / name
    files = sorted(path.glob(f"*{_INDEX_SUFFIX}")) or sorted(path.glob("*.safetensors"))
    if not files:
        raise _other_kind(path)
    if len(files) > 1:
        raise InputError(
            f"folder {path} has several checkpoints ({', '.join(file.name for file in files)}): "
            "name the file"
        )
    return files[0]


def _other_kind(path: Path) -> InputError:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    if any(file.name.endswith(_TORCH_SUFFIXES) for file in files):
        return InputError(
            f"checkpoint {path} is in torch's format, which can't be read by parts: convert it "
            "once with model.save_pretrained(folder, safe_serialization=True)"
        )
    missing = "" if path.exists() else " (there is no such file)"
    return InputError(
        f"checkpoint {path} is not a .safetensors file, a *{_INDEX_SUFFIX} or a folder with "
        f"one{missing}: give one of those"
    )


def _load_index(path: Path) -> Mapping[str, str]:
    try:
        document = parse_json(path.read_text(encoding="utf-8"))
        weight_map = document["weight_map"]
        sound = all(
            isinstance(shard, str) and Path(shard).name == shard for shard in weight_map.values()
        )
    except (OSError, UnicodeDecodeError, InputError) as error:
        raise InputError(
            f"index {path} can't be read ({error}): give a whole checkpoint"
        ) from error
    except (KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise InputError(
            f'index {path} is not {{"weight_map": {{tensor: file beside the index}}}}: give a '
            "whole checkpoint"
        )
    return dict(weight_map)
