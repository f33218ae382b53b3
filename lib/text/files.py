"""Text that a user names on a command line, as token sequences drawn from all over it.

Only as much is read as is needed, so the text may be of any size (a file of DOS lines is scanned
once). ``lib.text.formats`` says what can be read. Errors speak of ``--data``.
"""

import codecs
import glob
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..errors import InputError
from .formats import (
    LINE_END,
    TextFormat,
    check_binary,
    find_format,
    normalize_newlines,
    parse_record,
)

if TYPE_CHECKING:
    import torch

_CHUNK_BYTES = 16 * 1024
"""Text is drawn in chunks of this size: a few sequences each."""


def find_text_files(data: str) -> list[Path]:
    """Return the files that a path, a folder or a glob names; raises InputError if there are none,
    and where the only one holds no text.

    A folder is searched to any depth; hidden files and folders are left out.
    """
    path = Path(data)
    if path.is_file():
        found = [path]
    elif path.is_dir():
        found = [
            file
            for file in sorted(path.rglob("*"))
            if file.is_file() and "/." not in f"/{file.relative_to(path).as_posix()}"
        ]
    else:
        found = [Path(name) for name in sorted(glob.glob(data, recursive=True))]
        found = [file for file in found if file.is_file()]
    if not found:
        raise InputError(f"--data {data!r} names no file: give a text file, a folder or a glob")
    if len(found) == 1:
        _check_text(found[0])
    return found


def _check_text(file: Path) -> None:
    try:
        find_format(file)
    except InputError as error:
        raise InputError(f"--data {error}") from error
    except OSError as error:
        raise InputError(f"--data {file} can't be read: {error.strerror}") from error


def read_chunks(files: Sequence[Path], *, seed: int) -> Iterator[str]:
    """Yield the text of the files once, in chunks, in an order shuffled by ``seed``.

    A record of JSON Lines is a chunk of its own. Nothing but the chunks asked for is read, so the
    corpus may be of any size. Files that aren't UTF-8 text are skipped with a warning; if there is
    no other, that is an InputError.
    """
    skipped: dict[Path, InputError] = {}
    places: list[_Place] = []
    found = False

    def skip(file: Path, error: InputError) -> None:
        if len(files) == 1:
            raise InputError(f"--data {error}") from error
        if file.suffix not in {other.suffix for other in skipped}:
            print(f"warning: skipped {error} (and any like it)", file=sys.stderr)
        skipped[file] = error

    for file in files:
        try:
            places += _places(file)
        except InputError as error:
            skip(file, error)
        except OSError as error:
            raise InputError(f"--data {file} can't be read: {error.strerror}") from error
    random.Random(seed).shuffle(places)
    for place in places:
        if place.file in skipped:
            continue
        try:
            for chunk in place.read():
                found = True
                yield chunk
        except InputError as error:
            skip(place.file, error)
        except OSError as error:
            raise InputError(f"--data {place.file} can't be read: {error.strerror}") from error
    if skipped and not found:
        raise InputError(f"--data holds no text: {next(iter(skipped.values()))}")


@dataclass(frozen=True, slots=True)
class _Place:
    """A part of a file that is read at once: bytes [start, end)."""

    file: Path
    form: TextFormat
    start: int
    end: int

    def read(self) -> list[str]:
        """Return the chunks that lie here; raises InputError, beginning with the path."""
        try:
            with self.file.open("rb") as stream:
                if self.form is TextFormat.RECORDS:
                    return self._records(stream)
                return [self._text(stream)]
        except UnicodeDecodeError as error:
            raise InputError(f"{self.file} is not UTF-8 text: {error}") from error

    def _text(self, stream: BinaryIO) -> str:
        """Read a chunk; a character cut by its start or end belongs to neither chunk."""
        stream.seek(self.start)
        data = stream.read(self.end - self.start)
        last = not stream.read(1)
        check_binary(data, self.file)
        if self.start:
            start = next((i for i, byte in enumerate(data[:4]) if byte & 0xC0 != 0x80), 0)
            data = data[start:]
        text = codecs.getincrementaldecoder("utf-8")().decode(data, final=last)
        return normalize_newlines(text)

    def _records(self, stream: BinaryIO) -> list[str]:
        """Read the records whose lines begin here, the last one to its end."""
        stream.seek(max(self.start - 1, 0))
        data = bytearray(stream.read(self.end - stream.tell()))
        if self.start > 0:
            cut = LINE_END.search(data)  # the line before belongs to another place
            if cut is None:
                return []
            del data[: cut.end()]
        while data and data[-1] not in b"\r\n" and (more := stream.read(_CHUNK_BYTES)):
            cut = LINE_END.search(more)
            data += more if cut is None else more[: cut.end()]
        lines = LINE_END.split(data.removeprefix(codecs.BOM_UTF8))
        where = f"{self.file}, after byte {self.start},"
        return [parse_record(line.decode("utf-8"), where) for line in lines if line.strip()]


def _places(file: Path) -> list[_Place]:
    """Cut a file into places of ``_CHUNK_BYTES``, a DOS line end counted as the one byte that is
    read: the same text gives the same chunks whatever ends its lines.
    """
    form = find_format(file)
    size = file.stat().st_size
    with file.open("rb") as stream:
        first = len(codecs.BOM_UTF8) if stream.read(3) == codecs.BOM_UTF8 else 0
        stream.seek(first)
        if form is TextFormat.RECORDS or b"\r\n" not in stream.read(_CHUNK_BYTES):
            starts = list(range(first, size, _CHUNK_BYTES))
        else:
            starts = list(_dos_starts(stream, first))
    if form is TextFormat.RECORDS and starts:
        starts[0] = 0
    return [_Place(file, form, *ends) for ends in pairwise([*starts, size])]


def _dos_starts(stream: BinaryIO, first: int) -> Iterator[int]:
    """Yield where chunks begin that have ``_CHUNK_BYTES`` once their line ends are one byte."""
    start = first
    stream.seek(start)
    while data := stream.read(2 * _CHUNK_BYTES):
        yield start
        length, seen = 0, -1
        while seen != length:  # each line end that comes in makes room for one more byte
            seen, length = length, _CHUNK_BYTES + data.count(b"\r\n", 0, length)
        start += length + (data[length - 1 : length + 1] == b"\r\n")
        stream.seek(start)


def make_sequences(
    tokenizer: Any, chunks: Iterable[str], *, length: int, count: int, data: str
) -> "torch.Tensor":
    """Tokenize chunks into (at most count, length) ids; chunks are joined by the end-of-text token.

    Each sequence begins as the model's own inputs do, with its start token if the tokenizer adds
    one. A short text gives fewer sequences, perhaps none; InputError if it is empty.
    """
    import torch

    first = tokenizer("")["input_ids"][:1]
    start = first if first and first[0] == tokenizer.bos_token_id else []
    step = length - len(start)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    sequences: list[list[int]] = []
    rest: list[int] = []
    characters = 0
    for chunk in chunks:
        if not chunk.strip():
            continue
        characters += len(chunk)
        rest += tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"] + end
        while len(rest) >= step and len(sequences) < count:
            sequences.append(start + rest[:step])
            rest = rest[step:]
        if len(sequences) == count:
            break
    if not characters:
        raise InputError(f"--data {data!r} is empty: real text is needed")
    return torch.tensor(sequences, dtype=torch.int64).reshape(len(sequences), length)
