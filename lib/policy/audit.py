"""The audit log: what was asked of the veto, what it answered, and why."""

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from ..files import write_text

WHOLE_PLAN = "*"
"""Stands for the block in records about a whole plan."""
_LOG_LENGTH = 100_000


class Rule(StrEnum):
    """What was broken."""

    FLOOR = "floor"
    EPSILON = "epsilon"
    NO_PREDICTION = "no prediction"
    JOINT_CHECK = "joint check"
    BUDGET = "budget"
    MEASURED = "measured"


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One entry of the audit log.

    ``asked``: the precision, the present state and the one asked for, with an arrow between.
    ``predicted`` and ``limit`` are in nats per token, or for ``Rule.BUDGET`` in bytes; None:
    unknown, or no limit. ``broken`` is None where it was accepted.
    """

    block: str
    asked: str
    accepted: bool
    predicted: float | None
    limit: float | None
    broken: Rule | None
    reason: str


class Audit:
    """The log: the latest records, oldest first; ``count`` is of all there ever were."""

    def __init__(self) -> None:
        self._records: deque[Record] = deque(maxlen=_LOG_LENGTH)
        self.count = 0

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def add(self, record: Record) -> Record:
        """Append a record, and return it."""
        self.count += 1
        self._records.append(record)
        return record

    @property
    def rejections(self) -> list[Record]:
        """What was refused."""
        return [record for record in self if not record.accepted]

    def save(self, path: str | Path) -> None:
        """Write the log as JSON lines, atomically; ``number`` counts from the first record ever."""
        lines = [
            json.dumps({"number": number, **asdict(record)})
            for number, record in enumerate(self, start=self.count - len(self))
        ]
        write_text("".join(f"{line}\n" for line in lines), path)
