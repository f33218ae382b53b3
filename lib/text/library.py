"""Text that every machine with this project has, of kinds that are far apart.

Python: the sources of the running interpreter's library. C: the header files of Python and torch.
Prose: licences of installed packages and the language reference that ``help()`` reads. JSON: syntax
trees of the library's sources. They are for models whose experts should have something to
specialize on.
"""

import ast
import hashlib
import json
import os
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import InputError

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}
_LONGEST = 8_192
"""Characters of a document at most: many short ones mix better than a few long. Prose is cut into
pieces, of the others the beginning is taken.
"""
_LICENCE_WORDS = ("licen", "copying", "notice")


def kind_texts(kind: str, *, max_bytes: int) -> list[tuple[str, str]]:
    """Return names and texts of a kind of ``KINDS``, in the fixed order of names, different from
    each other and together at most ``max_bytes`` of UTF-8; raises InputError where there is none.
    """
    chosen: dict[str, str] = {}
    num_bytes = 0
    for name, read in sorted(KINDS[kind](), key=lambda text: name_place(text[0])):
        text = (read() or "")[:_LONGEST]
        size = len(text.encode())
        if num_bytes + size > max_bytes:
            break
        if text.strip() and text not in chosen:
            chosen[text] = name
            num_bytes += size
    if not chosen:
        raise InputError(
            f"DATA_KINDS: this machine has no text of the kind {kind!r} within {max_bytes} bytes: "
            "choose another corpus"
        )
    return [(name, text) for text, name in chosen.items()]


def name_place(name: str) -> bytes:
    """Return a name's place in the fixed pseudo-random order of files."""
    return hashlib.blake2b(name.encode()).digest()


def library_files() -> list[tuple[str, Path]]:
    """List the running interpreter's library sources: name below the library, path."""
    root = Path(sysconfig.get_path("stdlib"))
    paths: list[Path] = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        paths += [Path(folder, name) for name in files if name.endswith(".py")]
    paths = sorted(path for path in paths if path.is_file())
    if not paths:
        raise InputError(
            f"the running interpreter has no library source in {root}: choose DATA_FILES and give "
            "DATA_FILES_GLOB"
        )
    return [(path.relative_to(root).as_posix(), path) for path in paths]


def read_python(path: Path) -> str | None:
    """Read a source file in the encoding it declares; None for the library's deliberately broken
    test files.
    """
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError, LookupError):
        return None
    except OSError as error:
        raise InputError(f"library file {path} can't be read: {error.strerror}") from error


_Texts = Iterator[tuple[str, Callable[[], str | None]]]


def _python() -> _Texts:
    for name, path in library_files():
        yield name, lambda path=path: read_python(path)  # type: ignore[misc]


def _headers() -> _Texts:
    torch = find_spec("torch")
    folders = [Path(sysconfig.get_path("include"))]
    if torch is not None and torch.origin is not None:
        folders.append(Path(torch.origin).parent / "include")
    for folder in folders:
        for path in sorted(folder.rglob("*.h")):
            yield path.relative_to(folder).as_posix(), lambda path=path: _read(path)  # type: ignore[misc]


def _prose() -> _Texts:
    from pydoc_data.topics import topics

    texts = {f"reference/{name}": text for name, text in topics.items()}
    torch = find_spec("torch")
    if torch is not None and torch.origin is not None:
        packages = Path(torch.origin).parents[1]
        for path in sorted(packages.glob("*.dist-info/**/*")):
            if any(word in path.name.lower() for word in _LICENCE_WORDS) and path.is_file():
                texts[path.relative_to(packages).as_posix()] = _read(path) or ""
    for name, text in texts.items():
        for start in range(0, len(text), _LONGEST):
            piece = text[start : start + _LONGEST]
            yield f"{name}:{start}", lambda piece=piece: piece  # type: ignore[misc]


def _trees() -> _Texts:
    for name, path in library_files():
        yield name, lambda path=path: _tree(path)  # type: ignore[misc]


def _tree(path: Path) -> str | None:
    source = read_python(path)
    if source is None or len(source) > _LONGEST:  # its tree is ten times longer, and then cut
        return None
    try:
        return json.dumps(_as_json(ast.parse(source)), indent=1)
    except (SyntaxError, ValueError):
        return None


def _as_json(node: Any) -> Any:
    """Turn a syntax tree into what JSON has; constants that it lacks become their text."""
    if isinstance(node, ast.AST):
        fields = {name: _as_json(value) for name, value in ast.iter_fields(node)}
        return {"node": type(node).__name__} | {
            name: value for name, value in fields.items() if value not in (None, [])
        }
    if isinstance(node, list):
        return [_as_json(each) for each in node]
    return node if isinstance(node, str | int | float | bool | None) else str(node)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


KINDS: dict[str, Callable[[], _Texts]] = {
    "python": _python,
    "c": _headers,
    "prose": _prose,
    "json": _trees,
}
