"""What a long measurement has found so far, in a file, so that it goes on after an interruption.

One line per step, appended and flushed as soon as it is known, so an interrupted run loses no more
than the step it was in. The first line says what was being measured: steps of another model, text,
seed or scheme are not used.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, TypeVar

import xxhash

from ..errors import InputError

T = TypeVar("T")
_VERSION = 1


class Journal:
    """Steps by name, kept in a file: a ``lib.precision.remember.Remember``, and a context manager.

    ``subject``: whatever determines the results, as JSON. A file of another subject, or one that is
    damaged, is replaced, and stderr says so; of a last line cut off by a crash that step is lost.
    Left by an error the file stays, and stderr says where; left without one it is removed. Raises
    InputError where the file can't be written.
    """

    def __init__(self, path: Path, subject: Mapping[str, Any]) -> None:
        self.path = path
        self._key = hashlib.sha256(
            json.dumps([_VERSION, subject], sort_keys=True).encode()
        ).hexdigest()
        self._steps: dict[str, Any] = {}
        self._file: IO[bytes] | None = None

    def __enter__(self) -> "Journal":
        try:
            whole = self._read() if self.path.exists() else 0
            self._file = self.path.open("r+b" if whole else "wb")
        except OSError as error:
            raise InputError(
                f"{self.path} can't be written ({error.strerror}): give a writable output"
            ) from error
        self._file.truncate(whole)
        self._file.seek(whole)
        if whole == 0:
            self._write({"key": self._key})
        elif self._steps:
            print(f"going on after {len(self._steps)} steps, from {self.path}", file=sys.stderr)
        return self

    def __call__(self, name: str, compute: Callable[[], T], /) -> Any:
        """Return a step's result: the kept one, else what ``compute`` gives, which is then kept."""
        if name not in self._steps:
            self._steps[name] = compute()
            self._write({"name": name, "result": self._steps[name]})
        return self._steps[name]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._file is not None
        self._file.close()
        if kind is None or not self._steps:
            self.path.unlink(missing_ok=True)
        else:
            print(
                f"{len(self._steps)} steps are kept in {self.path}: the same call goes on from "
                "there",
                file=sys.stderr,
            )

    def _write(self, record: Mapping[str, Any]) -> None:
        assert self._file is not None, "enter the journal first"
        line = json.dumps(record, allow_nan=False).encode()
        self._file.write(b"%016x %b\n" % (xxhash.xxh3_64_intdigest(line), line))
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self) -> int:
        """Take over the steps of the file; return the bytes of it that are whole, 0 for none."""
        lines = self.path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is cut off
        try:
            records = [_parse(line) for line in lines]
            if not records or records[0]["key"] != self._key:
                print(f"{self.path} is of another measurement: starting anew", file=sys.stderr)
                return 0
            self._steps = {record["name"]: record["result"] for record in records[1:]}
        except (ValueError, KeyError, TypeError):
            print(f"{self.path} is damaged: starting anew", file=sys.stderr)
            self._steps = {}
            return 0
        return sum(len(line) + 1 for line in lines)


def _parse(line: bytes) -> dict[str, Any]:
    check, _, record = line.partition(b" ")
    if int(check, 16) != xxhash.xxh3_64_intdigest(record):
        raise ValueError("checksum")
    parsed: dict[str, Any] = json.loads(record)
    return parsed
