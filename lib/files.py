"""Writing a file so that nobody ever reads half of it."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from .errors import InputError


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
