"""The control file: how another process asks for another budget, and hears what came of it.

The file is one JSON object, ``{"HBM": "300MiB"}`` (a size, or null for no limit). Write it
elsewhere and rename it (``write_request`` does), so that it is never seen half-written. The answer
stands in ``<file>.status``, written in the same way and renewed twice a second: ``request`` repeats
what was asked, ``error`` says why it was refused (null: it was not), ``answers`` counts them,
``sample`` is the latest of ``observe``, and the rest is ``BudgetControl.status``.
"""

import json
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...files import write_json

_LARGEST_BYTES = 4096


def write_request(path: str | Path, size: str | int | None) -> None:
    """Ask for another budget of fast memory, from any process; a running controller sees it."""
    write_json({"HBM": size}, Path(path))


def status_path(path: str | Path) -> Path:
    """Return where the answer stands."""
    return Path(path).with_name(Path(path).name + ".status")


class ControlFile:
    """Watches a control file."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.parent.is_dir():
            raise InputError(f"the control file's folder {self.path.parent} isn't there: make it")
        self._seen: tuple[int, ...] | None = self._stamp()
        """What is there already was for an earlier run."""

    def read_change(self) -> str | int | None | InputError | bool:
        """Return the size that is asked for since the last call, None for no limit, an InputError
        for what can't be read; False: nothing has changed.
        """
        stamp = self._stamp()
        if stamp is None or stamp == self._seen:
            return False
        self._seen = stamp
        try:
            return _parse(self.path.read_bytes()[:_LARGEST_BYTES])
        except (OSError, InputError) as error:
            return error if isinstance(error, InputError) else InputError(str(error))

    def answer(self, status: dict[str, Any]) -> None:
        """Write the answer. It isn't flushed to the disk, which is busy with weights."""
        path = status_path(self.path)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps(status, allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(path)

    def _stamp(self) -> tuple[int, ...] | None:
        try:
            stat = self.path.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _parse(data: bytes) -> str | int | None:
    try:
        asked = json.loads(data)
    except ValueError as error:
        raise InputError(f"the control file isn't JSON ({error}): write {{'HBM': SIZE}}") from error
    if not isinstance(asked, dict) or asked.keys() != {"HBM"}:
        raise InputError('the control file must be {"HBM": SIZE}, and name no other tier')
    size = asked["HBM"]
    if size is not None and (isinstance(size, bool) or not isinstance(size, str | int)):
        raise InputError(f"the control file's HBM is {size!r}: give a size, or null for no limit")
    return size
