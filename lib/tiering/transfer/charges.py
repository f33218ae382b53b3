"""Charges: what a hypothetical machine takes time for beside the transfers into slots.

``Charges`` is that of a real machine, on which the time has passed already; ``EmulatedTime``
(emulation.py) lets it pass.
"""

import time

from ...vocabulary import Tier


class Charges:
    """Charges nothing."""

    def now(self) -> float:
        """Return the time in seconds, of which only differences mean anything."""
        return time.perf_counter()

    @property
    def virtual_seconds(self) -> float:
        """What was waited for on a virtual clock since the last reset."""
        return 0.0

    def fetch(self, tier: Tier, num_bytes: int) -> None:
        """Charge bytes that were read past the slots: rows of an embedding."""

    def use_in_place(self, num_bytes: int) -> None:
        """Charge one use of weights that are in fast memory."""

    def wait_error(self) -> dict[str, float] | None:
        """Return mean, p95 and largest overshoot of waits in microseconds, and the number of waits;
        None where none were made.
        """
        return None

    def reset(self) -> None:
        """Start these figures anew."""
