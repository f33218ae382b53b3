"""The budget of keys and values in an operator's hands: a control file that is watched while the
server runs.

    tierhints monitor kv.json --budget 256MiB

The file and its answer are as in ``tiering.control.file``; the status is the engine's figures.
"""

import contextlib
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..progressive.engine import Engine
from ..tiering.control.file import ControlFile
from ..units import parse_bytes

_POLL_SECONDS = 0.1
_RENEW_SECONDS = 0.5


@contextlib.contextmanager
def watched_budget(engine: Engine, path: Path | None) -> Iterator[None]:
    """Change the engine's budget as a control file says, until the end; None: there is none.

    Raises InputError where the file can't be.
    """
    if path is None:
        yield
        return
    watch, stop = _Watch(engine, ControlFile(path)), threading.Event()

    def run() -> None:
        while not stop.wait(_POLL_SECONDS):
            try:
                watch.look()
            except Exception as error:  # the server goes on with the budget that it has
                warnings.warn(f"{path} isn't answered: {error}", RuntimeWarning, stacklevel=1)

    thread = threading.Thread(target=run, daemon=True, name="tierhints-control")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


class _Watch:
    """Does what a control file asks for, and says what came of it."""

    def __init__(self, engine: Engine, file: ControlFile) -> None:
        self._engine, self._file = engine, file
        self._said: dict[str, Any] = {"request": None, "error": None, "answers": 0}
        self._write()

    def look(self) -> None:
        """Look at what has changed."""
        asked = self._file.read_change()
        if asked is not False:
            self._answer(asked)
        elif time.monotonic() - self._written_at > _RENEW_SECONDS:
            self._write()

    def _answer(self, asked: str | int | None | InputError) -> None:
        error: InputError | None = None
        try:
            if isinstance(asked, InputError):
                raise asked
            if asked is None:
                raise InputError("keys and values can't be without a budget: give a size")
            self._engine.resize(parse_bytes(asked))
        except InputError as refusal:  # whoever has asked is in another process
            error = refusal
        self._said = {
            "request": None if isinstance(asked, InputError) else asked,
            "error": None if error is None else str(error),
            "answers": self._said["answers"] + 1,
        }
        self._write()

    def _write(self) -> None:
        self._written_at = time.monotonic()
        self._file.answer({**self._said, **asdict(self._engine.stats())})
