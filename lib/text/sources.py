"""Where training text comes from: what every machine has (``library``), the user's files, datasets
of the Hub.

A source is a stream of documents in a fixed order, each already marked as training or held-out
text. The mark is a function of the document's content, so a document keeps it when the corpus
grows, and two copies of one document never lie on both sides. What is read is capped by
DATA_MAX_MIB. Nothing here tokenizes.
"""

import glob
import hashlib
import importlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..config import DataConfig
from ..errors import InputError
from ..units import MIB
from .formats import TextFormat, find_format, read_records
from .hub import HUB_DATASETS, HubDataset, _hub_texts, _resolve_revision
from .library import KINDS, kind_texts, library_files, name_place, read_python

_SECTION_BYTES = (2_048, 65_536)
"""Smallest and largest aim for a section of a corpus that is one single file."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text; ``heldout`` documents are never trained on. ``kind``: of DATA_KINDS, else empty."""

    text: str
    heldout: bool
    kind: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A corpus before tokenization. ``fingerprint`` changes whenever the documents would."""

    name: str
    fingerprint: str
    total_bytes: int | None
    documents: Callable[[], Iterator[Document]]


def open_source(data: DataConfig) -> Source:
    """Return the source that the configuration names; raises InputError when there is nothing to
    read.
    """
    version = ".".join(map(str, sys.version_info[:3]))
    if data.source == "stdlib":
        return _local_source(f"stdlib-{version}", list(_stdlib_entries()), data)
    if data.source == "kinds":
        share = data.max_mib * MIB // len(KINDS)
        entries = [
            _text_entry(f"{kind}/{name}", text, kind)
            for kind in KINDS
            for name, text in kind_texts(kind, max_bytes=share)
        ]
        return _local_source(f"kinds-{version}", entries, data)
    if data.source == "files":
        return _local_source("files", list(_file_entries(data.files, data.max_mib * MIB)), data)
    return _hub_source(data.source, HUB_DATASETS[data.source], data)


def content_hash(text: str) -> int:
    """Return 64 bits of a text's BLAKE2b hash: the document's place in the held-out order."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


@dataclass(frozen=True, slots=True)
class _Entry:
    """A local document that can be read again: its stable name, its size on disk and its reader."""

    name: str
    num_bytes: int
    read: Callable[[], str | None]
    kind: str = ""


def _local_source(name: str, entries: list[_Entry], data: DataConfig) -> Source:
    """Select entries up to the cap in a fixed pseudo-random order, hash their text and mark the
    held-out ones.
    """
    cap = data.max_mib * MIB
    entries.sort(key=lambda entry: name_place(entry.name))
    chosen: list[tuple[_Entry, int]] = []
    fingerprint = hashlib.blake2b(digest_size=16)
    total_bytes = 0
    for entry in entries:
        if total_bytes + entry.num_bytes > cap or not entry.num_bytes:
            continue
        text = entry.read()
        if text is None or not text.strip():
            continue
        place = content_hash(text)
        chosen.append((entry, place))
        fingerprint.update(place.to_bytes(8, "big"))
        total_bytes += entry.num_bytes
    if not chosen:
        raise InputError(
            f"data source {name!r}: no text within DATA_MAX_MIB={data.max_mib} ({len(entries)} "
            "files found): give files that hold text, or raise DATA_MAX_MIB"
        )
    if len({place for _, place in chosen}) < 2:
        raise InputError(
            f"data source {name!r} is one document and held-out text is whole documents: give "
            "several files, or one with blank lines between its parts"
        )
    # The document first in hash order, of each kind, is always held out, so that a small corpus has
    # held-out text at all.
    last_heldout = {
        kind: max(
            data.heldout_permille * 2**64 // 1000 - 1,
            min(place for entry, place in chosen if entry.kind == kind),
        )
        for kind in {entry.kind for entry, _ in chosen}
    }

    def documents() -> Iterator[Document]:
        for entry, place in chosen:
            text = entry.read()
            if text is not None:
                yield Document(text, place <= last_heldout[entry.kind], entry.kind)

    return Source(
        name=name,
        fingerprint=fingerprint.hexdigest(),
        total_bytes=total_bytes,
        documents=documents,
    )


def _stdlib_entries() -> Iterator[_Entry]:
    """List the library's .py files and, for modules written in C, their documentation strings."""
    for name, path in library_files():
        yield _Entry(name, path.stat().st_size, partial(read_python, path))
    for name in sorted(sys.builtin_module_names):
        yield _text_entry(f"<builtin>/{name}", _documentation(name))


def _text_entry(name: str, text: str, kind: str = "") -> _Entry:
    return _Entry(name, len(text.encode()), lambda: text, kind)


def _documentation(module_name: str) -> str:
    """Collect the documentation strings of a built-in module, its functions, its classes and
    their methods.
    """
    module = importlib.import_module(module_name)
    parts = [(module_name, module.__doc__)]
    for name, member in sorted(vars(module).items()):
        if getattr(member, "__module__", None) not in (module_name, None):
            continue
        if isinstance(member, type):
            parts.append((name, member.__doc__))
            parts.extend(
                (f"{name}.{method}", getattr(value, "__doc__", None))
                for method, value in sorted(vars(member).items())
                if callable(value)
            )
        elif callable(member):
            parts.append((name, member.__doc__))
    return "\n\n".join(
        f"{name}\n{text}" for name, text in parts if isinstance(text, str) and text.strip()
    )


def _file_entries(pattern: str, max_characters: int) -> Iterator[_Entry]:
    """List the user's files: a file, a folder (all files below it but hidden ones) or a glob. One
    single file is cut into sections; each record of JSON Lines is a document.
    """
    if not pattern:
        raise InputError(
            "DATA_FILES_GLOB is empty: give a file, a folder or a glob such as texts/**/*.txt"
        )
    root = Path(pattern).expanduser()
    if root.is_dir():
        paths = [
            path
            for path in sorted(root.rglob("*"))
            if path.is_file() and "/." not in f"/{path.relative_to(root).as_posix()}"
        ]
    elif root.is_file():
        paths, root = [root], root.parent
    else:
        found = glob.glob(str(root), recursive=True)
        paths = [path for path in sorted(map(Path, found)) if path.is_file()]
        root = Path(".")
    if not paths:
        raise InputError(
            f"DATA_FILES_GLOB={pattern!r} matches no file: give an existing file, folder or glob"
        )
    names = {
        path: (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()
        for path in paths
    }
    forms: dict[TextFormat, list[Path]] = {form: [] for form in TextFormat}
    for path in paths:
        with _reading(path):
            forms[find_format(path)].append(path)
    plain = forms[TextFormat.PLAIN]
    if len(paths) == len(plain) == 1:
        text = _read_text(paths[0], max_characters)
        for index, section in enumerate(cut_sections(text)):
            yield _text_entry(str(index), section)
        return
    for path in plain:
        yield _Entry(names[path], path.stat().st_size, partial(_read_text, path))
    # No more of the records than the cap is read; in an order that favours no name.
    left = max_characters
    for path in sorted(forms[TextFormat.RECORDS], key=lambda path: name_place(names[path])):
        with _reading(path):
            for number, text in enumerate(read_records(path)):
                left -= len(text)
                if left < 0:
                    return
                yield _text_entry(f"{names[path]}:{number}", text)


def _read_text(path: Path, max_characters: int = -1) -> str:
    with _reading(path), path.open(encoding="utf-8-sig") as file:
        return file.read(max_characters)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Say of a user's file that can't be read what to do about it."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{error}; or leave it out of DATA_FILES_GLOB") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text (byte {error.start}): leave it out of DATA_FILES_GLOB, or "
            "convert it"
        ) from error
    except OSError as error:
        raise InputError(
            f"{path} can't be read ({error.strerror}): fix its permissions, or leave it out of "
            "DATA_FILES_GLOB"
        ) from error


def cut_sections(text: str) -> list[str]:
    """Cut one long text at blank lines into sections that serve as documents; sections never
    overlap.
    """
    smallest, largest = _SECTION_BYTES
    aim = min(max(len(text) // 500, smallest), largest)
    sections: list[str] = []
    size = aim
    for paragraph in re.split(r"(?<=\n)\s*\n", text):
        if size >= aim:
            sections.append(paragraph)
            size = 0
        else:
            sections[-1] += "\n" + paragraph
        size += len(paragraph)
    return [section for section in sections if section.strip()]


def _hub_source(name: str, hub: HubDataset, data: DataConfig) -> Source:
    revision = _resolve_revision(hub)
    cap = data.max_mib * MIB
    threshold = data.heldout_permille * 2**64 // 1000

    def documents() -> Iterator[Document]:
        if hub.heldout_split is not None:
            for split, heldout in ((hub.heldout_split, True), ("train", False)):
                for text in _capped(_hub_texts(name, hub, revision, split), cap):
                    yield Document(text, heldout)
        else:
            for text in _capped(_hub_texts(name, hub, revision, "train"), cap):
                yield Document(text, content_hash(text) < threshold)

    return Source(name=name, fingerprint=revision, total_bytes=None, documents=documents)


def _capped(texts: Iterable[str], cap: int) -> Iterator[str]:
    """Pass non-empty texts on until their bytes would pass the cap."""
    num_bytes = 0
    for text in texts:
        num_bytes += len(text.encode())
        if num_bytes > cap:
            return
        if text.strip():
            yield text
