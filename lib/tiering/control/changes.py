"""A decision that was carried out."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What a decision has brought about. Seconds are of the clock given to ``BudgetControl``.

    ``asked_at``: when it was asked for, or decided; ``began_at``: when the model's thread came by;
    ``ended_at``: when the memory was given back. ``fast_bytes``: what is planned to be taken since,
    ``resident_bytes``: what was measured.
    """

    asked_at: float
    began_at: float
    ended_at: float
    reason: str
    demoted: tuple[str, ...]
    promoted: tuple[str, ...]
    limit_bytes: int | None
    fast_bytes: int
    resident_bytes: int

    @property
    def seconds(self) -> float:
        """From the wish to its end."""
        return self.ended_at - self.asked_at
