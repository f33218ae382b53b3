"""Writing a file so that nobody ever reads half of it."""

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from .errors import InputError


def check_writable(path: str | Path | None) -> None:
    """Refuse, before the work starts, an output file that could not be written at its end."""
    if path is None:
        return
    path = Path(path)
    if path.is_dir():
        raise InputError(f"output {path} is a folder: give a file name")
    folder = path.absolute().parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"output {path} can't be written ({error.strerror}): give a writable folder"
        ) from error


def write_text(text: str, path: str | Path) -> None:
    """Write a temporary file beside ``path``, flush it to the disk and rename it; makes the folder
    if need be.

    Raises InputError where the path can't be written at all, OSError where the writing failed (a
    full disk); the old file is then untouched.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except (
        PermissionError,
        NotADirectoryError,
        IsADirectoryError,
        FileExistsError,
        FileNotFoundError,
    ) as error:
        raise InputError(
            f"{path} can't be written ({error.strerror}): give a writable file name"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_json(document: Any, path: str | Path) -> None:
    """Write a document as indented JSON like ``write_text``; ValueError for NaN and infinity."""
    write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", path)
