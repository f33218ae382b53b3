"""Where weights come from: safetensors checkpoints, read by name and by rows, never as a whole.

Names and layouts are the model's: tensors that the checkpoint has under another name, or in parts,
are found and put together (``packed``). The files themselves are in ``files``.
"""

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch
import xxhash
from torch import Tensor, nn

from ..blocks import Run, digest_samples
from ..errors import InputError
from ..units import MIB, rows_within
from .ahead import ReadAhead
from .files import PLAIN_DTYPES, Entry, Extent, open_files
from .packed import packed_layouts

_PIECE_BYTES = 2 * MIB
"""Read ahead at a time: the fp32 weights that are encoded at once."""


@dataclass(frozen=True, slots=True)
class _Stack:
    """Tensors that are one in the model: the parts of each row lie below each other."""

    rows: tuple[tuple[Entry, ...], ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.rows[0][0].dtype

    @property
    def shape(self) -> torch.Size:
        height = sum(part.shape[0] for part in self.rows[0])
        return torch.Size((len(self.rows), height, *self.rows[0][0].shape[1:]))

    @property
    def identity(self) -> str:
        return "|".join(part.identity for row in self.rows for part in row)

    def read(self, first: int, out: Tensor, name: str) -> None:
        """Fill a contiguous tensor with rows from the first one on, a part at a time."""
        for row, target in zip(self.rows[first : first + len(out)], out, strict=True):
            start = 0
            for part in row:
                part.read(0, target[start : start + part.shape[0]], name)
                start += part.shape[0]

    def extents(self, start: int, end: int) -> Iterator[Extent]:
        """Yield where elements [start, end) lie, in row-major order."""
        first = 0
        for part in (part for row in self.rows for part in row):
            last = first + part.shape.numel()
            if max(start, first) < min(end, last):
                yield from part.extents(max(start, first) - first, min(end, last) - first)
            first = last


def _pieces(entry: Entry | _Stack) -> Iterator[Extent]:
    """Yield the parts in which a whole tensor is read ahead: some rows each."""
    row_bytes = max(entry.shape[-1:].numel() * entry.dtype.itemsize, 1)
    for extent in entry.extents(0, entry.shape.numel()):
        yield from extent.cut(rows_within(_PIECE_BYTES, row_bytes) * row_bytes)


class CheckpointSource:
    """A folder with safetensors files, one such file, or the index of a sharded checkpoint.

    Names are looked up as they are, then with ``base_model_prefix`` ("transformer") added or taken
    away, then as the other names of the same tied weight (``tied``: groups of names). Files stay
    open. Raises InputError where the checkpoint is not whole, or is of another kind.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        base_model_prefix: str = "",
        tied: Iterable[Collection[str]] = (),
    ) -> None:
        self.path = Path(path)
        self._prefix = f"{base_model_prefix}." if base_model_prefix else ""
        self._tied = {name: tuple(group) for group in tied for name in group}
        self._files = open_files(self.path)
        self._entries: dict[str, Entry | _Stack] = dict(self._files)
        self._ahead = ReadAhead(())
        self._origins: dict[str, tuple[str, ...]] = {name: (name,) for name in self._files}
        """The files' tensors that each is made of."""
        self._resolved: dict[str, str | None] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The names in the checkpoint."""
        return tuple(self._entries)

    def __contains__(self, name: str) -> bool:
        return self._resolve(name) is not None

    def own_name(self, name: str) -> str | None:
        """Return what the checkpoint calls a tensor, other names of a tied weight left aside."""
        return next((found for found in self._spellings(name) if found in self._entries), None)

    def taken(self, names: Iterable[str]) -> set[str]:
        """Return the files' tensors that are behind some of the model's names."""
        found = (self._resolve(name) for name in names)
        return {origin for name in found if name is not None for origin in self._origins[name]}

    def in_files(self) -> dict[str, torch.dtype]:
        """Return the files' own tensors with their dtypes."""
        return {name: entry.dtype for name, entry in self._files.items()}

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors in the files."""
        return sum(entry.num_bytes for entry in self._files.values())

    def first_dtype(self) -> torch.dtype:
        """Return the dtype of the first tensor of plain floats, files and names in order; float32
        where there is none. transformers takes it where config.json names no dtype.
        """
        order = sorted(self._files, key=lambda name: (self._files[name].file.path.name, name))
        dtypes = (self._files[name].dtype for name in order)
        return next((dtype for dtype in dtypes if dtype in PLAIN_DTYPES), torch.float32)

    def resolve(self, name: str) -> str:
        """Return the checkpoint's name of a tensor; raises InputError where it has none."""
        found = self._resolve(name)
        if found is None:
            raise InputError(
                f"checkpoint {self.path} has no tensor {name!r} (it has {len(self._entries)}, such "
                f"as {next(iter(self._entries), 'none')!r}): give the checkpoint of this model"
            )
        return found

    def shape(self, name: str) -> torch.Size:
        """Return a tensor's shape, from the header."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype, from the header."""
        return self._entry(name).dtype

    def identity(self, name: str) -> str:
        """Return a key (hex) for a tensor's values: another one as soon as its file was written to.

        Made from the file's inode, size and times, its header, and the name: data isn't read.
        """
        entry = self._entry(name)
        text = f"{entry.identity}|{self.resolve(name)}"
        return xxhash.xxh3_128_hexdigest(text.encode())

    def read(self, name: str, start_row: int | None = None, end_row: int | None = None) -> Tensor:
        """Read a tensor into fresh memory, or rows [start_row, end_row) of its first dimension,
        which may be overwritten by the next read: copy what is to stay.

        The file's pages don't stay in the page cache. Raises InputError for rows that aren't there,
        PlacementError where the file can't be read or has changed since it was opened.
        """
        entry = self._entry(name)
        shape, first = entry.shape, 0
        if start_row is not None or end_row is not None:
            num_rows = shape[0] if shape else 0
            first = 0 if start_row is None else start_row
            last = num_rows if end_row is None else end_row
            if not 0 <= first <= last <= num_rows:
                raise InputError(
                    f"tensor {name!r} has rows 0 to {num_rows}, not {first} to {last}: ask for "
                    "some of those"
                )
            shape = torch.Size((last - first, *shape[1:]))
        size = entry.dtype.itemsize
        offset, num_bytes = first * shape[1:].numel() * size, shape.numel() * size
        if start_row is not None:
            lent = self._ahead.borrow(name, offset, num_bytes)
            if lent is not None and lent.data_ptr() % size == 0:
                return lent.view(entry.dtype).view(shape)
        tensor = torch.empty(shape, dtype=entry.dtype)
        if tensor.numel() and not self._ahead.copy(name, offset, tensor.view(-1).view(torch.uint8)):
            entry.read(first, tensor, name)
        return tensor

    @contextlib.contextmanager
    def reading_ahead(self, names: Iterable[str]) -> Iterator[None]:
        """Read these tensors ahead, which will be asked for in this order; at the end let go of
        those that were not.
        """
        entries = {name: self._entry(name) for name in names}
        self._ahead = ReadAhead((name, _pieces(entry)) for name, entry in entries.items())
        try:
            yield
        finally:
            self._ahead.close()

    def sample(self, name: str, runs: Sequence[Run]) -> Tensor:
        """Read some runs of a flattened tensor's elements, one after another: 1-D. As many small
        reads are made, all at the same time. Raises PlacementError like ``read``.
        """
        entry = self._entry(name)
        extents = [extent for start, end in runs for extent in entry.extents(start, end)]
        for extent in extents:
            extent.announce()
        num_bytes = sum(extent.num_bytes for extent in extents)
        values = torch.empty(num_bytes, dtype=torch.uint8)
        data, filled = memoryview(values.numpy()), 0  # type: ignore[arg-type]
        for extent in extents:
            extent.read_into(data[filled : filled + extent.num_bytes], name)
            filled += extent.num_bytes
        return values.view(entry.dtype)

    def digest(self, names: Iterable[str], like: str = "") -> str:
        """Identify the weights of a model's parameters like ``blocks.parameter_digest``; names are
        the canonical ones.
        """
        return digest_samples(
            ((name, self.shape(name), partial(self.sample, name)) for name in sorted(names)), like
        )

    def arrange(
        self, renamed: Mapping[str, str], stacked: Mapping[str, Sequence[Sequence[str]]]
    ) -> None:
        """Give tensors other names, and make one of several: per row of the first dimension the
        names of those that lie below each other. Raises InputError where these don't fit.
        """
        self._resolved.clear()
        found = dict(self._entries)
        for name, source in renamed.items():
            self._entries[name] = found[source]
            self._origins[name] = (source,)
        for name, rows in stacked.items():
            parts = tuple(tuple(cast(Entry, found[source]) for source in row) for row in rows)
            shapes = {tuple(part.shape for part in row) for row in parts}
            inner = {(part.dtype, part.shape[1:]) for row in parts for part in row}
            if len(shapes) != 1 or len(inner) != 1:
                raise InputError(
                    f"checkpoint {self.path}: the slices of tensor {name!r}, such as "
                    f"{rows[0][0]!r}, differ in shape or dtype: give a whole checkpoint"
                )
            self._entries[name] = _Stack(parts)
            self._origins[name] = tuple(source for row in rows for source in row)

    def _entry(self, name: str) -> Entry | _Stack:
        return self._entries[self.resolve(name)]

    def _resolve(self, name: str) -> str | None:
        if name not in self._resolved:
            found = (self.own_name(each) for each in (name, *self._tied.get(name, ())))
            self._resolved[name] = next((each for each in found if each is not None), None)
        return self._resolved[name]

    def _spellings(self, name: str) -> Iterator[str]:
        yield name
        if self._prefix:
            if name.startswith(self._prefix):
                yield name.removeprefix(self._prefix)
            else:
                yield self._prefix + name


def open_checkpoint(model: nn.Module, path: str | Path) -> CheckpointSource:
    """Open a model's checkpoint, under the names that its parameters and buffers have in it."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    prefix = getattr(model, "base_model_prefix", "")
    source = CheckpointSource(path, base_model_prefix=prefix, tied=names.values())
    if not all(name in source for name in model.state_dict(keep_vars=True)):
        # Only then: transformers' tables of renamed tensors take half a second to build.
        source.arrange(*packed_layouts(model, source.names))
    return source
