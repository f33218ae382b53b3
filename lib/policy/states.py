"""The seven states of a block, and which changes between them are allowed.

A state is precision and residency together. Weights don't change during inference, so leaving fast
memory copies nothing: the bytes below are still there. Entering it always goes through S6.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import PlacementError
from ..vocabulary import Precision, State, Tier

_RESIDENT = frozenset({State.FULL, State.REDUCED, State.COMPRESSED})
_BELOW = frozenset({State.STAGED, State.COLD, State.RECOMPUTABLE})

ALLOWED: Mapping[State, frozenset[State]] = {
    # Precision can be dropped in place, and never be won back there.
    State.FULL: frozenset({State.REDUCED, State.COMPRESSED}) | _BELOW,
    State.REDUCED: frozenset({State.COMPRESSED}) | _BELOW,
    State.COMPRESSED: frozenset({State.REDUCED}) | _BELOW,
    State.STAGED: frozenset({State.COLD, State.IN_FLIGHT, State.RECOMPUTABLE}),
    State.COLD: frozenset({State.STAGED, State.IN_FLIGHT, State.RECOMPUTABLE}),
    # A transfer arrives, or is given up and the block is where it was.
    State.IN_FLIGHT: _RESIDENT | _BELOW,
    State.RECOMPUTABLE: frozenset({State.STAGED, State.COLD, State.IN_FLIGHT}),
}
"""State -> the states that may follow it."""

_STATE_OF_TIER = {
    Tier.CPU: State.STAGED,
    Tier.CXL: State.STAGED,
    Tier.PEER: State.STAGED,
    Tier.SSD: State.COLD,
    Tier.OBJECT: State.COLD,
}
_FLOAT_PRECISIONS = frozenset({"fp32", "fp16", "bf16"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """A block's change of state, with the reason that goes to the audit log.

    Raises PlacementError for a change that is not allowed.
    """

    block: str
    before: State
    after: State
    reason: str

    def __post_init__(self) -> None:
        if self.after not in ALLOWED[self.before]:
            allowed = ", ".join(sorted(ALLOWED[self.before]))
            raise PlacementError(
                f"block {self.block!r} can't go from {self.before} to {self.after} "
                f"({self.reason}); from {self.before} allowed: {allowed}"
            )


def placed_state(tier: Tier, precision: Precision, *, computed_as_is: bool) -> State:
    """Return the state of a block at rest in a tier.

    ``computed_as_is``: the precision is below the model's own, and the bytes are multiplied with as
    they are, nothing is expanded.
    """
    if tier is not Tier.HBM:
        return _STATE_OF_TIER[tier]
    if computed_as_is:
        return State.REDUCED
    return State.FULL if precision in _FLOAT_PRECISIONS else State.COMPRESSED


def find_path(before: State, after: State) -> tuple[State, ...]:
    """Return the states to go through from one state at rest to another, both included."""
    if after == before:
        return (before,)
    if after in ALLOWED[before]:
        return (before, after)
    if before in _RESIDENT:  # precision that was dropped comes from below
        return (before, State.STAGED, State.IN_FLIGHT, after)
    return (before, State.IN_FLIGHT, after)
