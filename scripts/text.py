"""Text that a user names on a command line, as token sequences drawn from all over it.

Only as much is read as is needed, so the text may be of any size. Errors speak of ``--data``.
"""

import codecs
import glob
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.errors import InputError

if TYPE_CHECKING:
    import torch

_CHUNK_BYTES = 16 * 1024
"""Text is drawn in chunks of this size: a few sequences each."""


def find_text_files(data: str) -> list[Path]:
    """Return the files that a path, a folder or a glob names; raises InputError if there are none.

    A folder is searched to any depth; hidden files and folders are left out.
    """
    path = Path(data)
    if path.is_file():
        return [path]
    if path.is_dir():
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
    return found


def read_chunks(files: Sequence[Path], *, seed: int) -> Iterator[str]:
    """Yield the text of the files once, in chunks, in an order shuffled by ``seed``.

    Nothing but the chunks asked for is read, so the corpus may be of any size. Files that aren't
    UTF-8 text are skipped with a warning; if it is the only file, that is an InputError.
    """
    places = [
        (file, offset) for file in files for offset in range(0, file.stat().st_size, _CHUNK_BYTES)
    ]
    random.Random(seed).shuffle(places)
    skipped: set[Path] = set()
    for file, offset in places:
        if file in skipped:
            continue
        try:
            yield _read_chunk(file, offset)
        except UnicodeDecodeError as error:
            if len(files) == 1:
                raise InputError(f"--data {file} is no UTF-8 text: {error}") from error
            if not skipped:
                print(f"warning: skipped {file} and any like it: no UTF-8 text", file=sys.stderr)
            skipped.add(file)
        except OSError as error:
            raise InputError(f"--data {file} can't be read: {error.strerror}") from error


def _read_chunk(file: Path, offset: int) -> str:
    """Read one chunk; a character cut by its start or end belongs to neither chunk."""
    with file.open("rb") as stream:
        stream.seek(offset)
        data = stream.read(_CHUNK_BYTES)
        last = not stream.read(1)
    if b"\0" in data:
        position = data.index(b"\0")
        raise UnicodeDecodeError("utf-8", data, position, position + 1, "binary data")
    if offset:
        start = next((i for i, byte in enumerate(data[:4]) if byte & 0xC0 != 0x80), 0)
        data = data[start:]
    return codecs.getincrementaldecoder("utf-8")().decode(data, final=last)


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
