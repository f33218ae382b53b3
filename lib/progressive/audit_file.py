"""What audits of a calibration have found, in a file beside it: what was stopped stays so when a
server starts again.

The file has, for each calibration by its digest and each delta, the counts that the evidence
depends on (``audit.py``). Servers may share it: each audit is added to what stands there, under a
lock of the calibration's own file, and what they all have found is one test.
"""

import fcntl
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import check_writable, parse_json, write_json
from .audit import AuditCounts

FORMAT = "tierhints audits of calibrations 1"
_Found = dict[str, dict[float, AuditCounts]]
"""Digest of a calibration -> delta -> counts."""


class AuditFile:
    """The audits of one calibration, in ``<its file>.audits``; ``digest``: the calibration's.

    Raises InputError where they can't be written, and for a file of something else.
    """

    def __init__(self, calibration: Path, digest: str) -> None:
        self.path = calibration.with_name(f"{calibration.name}.audits")
        self._calibration, self._digest = calibration, digest
        self._unwritten: list[tuple[float, bool]] = []
        """Audits: their delta, and whether the bound was broken."""
        check_writable(self.path)
        self.found = self._read().get(digest, {})
        """Delta -> counts, of all that have audited this calibration."""

    def add(self, delta: float, *, broken: bool) -> None:
        """Add an audit. Raises InputError or OSError where the file can't be read or written: the
        audit is then added together with the next.
        """
        self._unwritten.append((delta, broken))
        lock = os.open(self._calibration, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            every = self._read()
            own = every.setdefault(self._digest, {})
            for each, bad in self._unwritten:
                own[each] = own.get(each, AuditCounts()).add(each, broken=bad)
            document = {
                digest: {str(delta): asdict(counts) for delta, counts in of.items()}
                for digest, of in every.items()
            }
            write_json({"format": FORMAT, "calibrations": document}, self.path)
            self._unwritten.clear()
            self.found = own
        finally:
            os.close(lock)

    def _read(self) -> _Found:
        try:
            document = parse_json(self.path.read_text("utf-8"))
            if document["format"] != FORMAT:
                raise InputError(f"its format is {document['format']!r}, not {FORMAT!r}")
            return {
                digest: {float(delta): _counts(counts) for delta, counts in own.items()}
                for digest, own in document["calibrations"].items()
            }
        except FileNotFoundError:
            return {}
        except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{self.path} isn't what audits have found ({error}): remove it, and bounds that "
                "were stopped are taken for good again"
            ) from error


def _counts(document: Mapping[str, Any]) -> AuditCounts:
    counts = AuditCounts(**document)
    if not 0 <= counts.broken <= counts.audits or not isinstance(counts.stopped, bool):
        raise ValueError(f"{dict(document)} are no counts")
    return counts
