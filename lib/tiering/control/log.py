"""The controller's log: observations and decisions as JSON lines, appended as they happen.

A line is written by one call, so that only the last one can be torn; ``policy.replay`` reads it. A
file that is there already is continued: its next run begins with a header of its own.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...machine import TierSpec
from ...policy.control import POLICY_VERSION, Settings
from ...policy.events import SCHEMA_VERSION, Decision, Observation, write_event
from ...vocabulary import Tier

DIGEST_EVERY = 32
"""Observations between two hashes of the controller's state."""


class ControlLog:
    """One run's log. Used by one thread at a time. Raises InputError for a file that can't be
    written.
    """

    def __init__(
        self, path: str | Path, settings: Settings, tiers: Mapping[Tier, TierSpec]
    ) -> None:
        self.path = Path(path)
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            self._file = os.open(self.path, flags, 0o644)
        except OSError as error:
            raise InputError(f"the log {path} can't be written: {error.strerror}") from error
        if self.path.stat().st_size:
            os.write(self._file, b"\n")  # ends a line that was torn; an empty one means nothing
        self._write(
            {
                "header": {
                    "schema_version": SCHEMA_VERSION,
                    "policy_version": POLICY_VERSION,
                    "settings": asdict(settings),
                    "tiers": {tier: asdict(spec) for tier, spec in tiers.items()},
                }
            }
        )

    def add(self, observation: Observation, decision: Decision | None, digest: str | None) -> None:
        """Append an observation, what was decided, and (now and then) the hash of the state."""
        entry: dict[str, Any] = {"observation": write_event(observation)}
        if decision is not None:
            entry["decision"] = write_event(decision)
        if digest is not None:
            entry["digest"] = digest
        self._write(entry)

    def close(self) -> None:
        """Close the file; nothing is added afterwards."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _write(self, entry: dict[str, Any]) -> None:
        if self._file >= 0:
            os.write(self._file, json.dumps(entry, separators=(",", ":")).encode() + b"\n")
