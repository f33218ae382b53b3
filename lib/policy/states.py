"""The seven states of a block, which changes between them are allowed, and the record of one.

A state is precision and residency together. Weights don't change during inference, so leaving fast
memory copies nothing: the bytes below are still there. Entering it always goes through S6. Another
precision is always made from the original, which is below: what is held is let go of first, and
nothing is won, or dropped, in place. S7 has no transitions: a tied copy is never held, it is its
source's weights wherever these are.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import PlacementError
from ..vocabulary import Precision, State, Tier

_RESIDENT = frozenset({State.FULL, State.REDUCED, State.COMPRESSED})
_BELOW = frozenset({State.STAGED, State.COLD})

ALLOWED: Mapping[State, frozenset[State]] = {
    State.FULL: _BELOW,
    State.REDUCED: _BELOW,
    State.COMPRESSED: _BELOW,
    State.STAGED: frozenset({State.COLD, State.IN_FLIGHT}),
    State.COLD: frozenset({State.STAGED, State.IN_FLIGHT}),
    # A transfer arrives, or is given up and the block is where it was.
    State.IN_FLIGHT: _RESIDENT | _BELOW,
    State.RECOMPUTABLE: frozenset(),
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
    """A block's change of state, as whatever has executed it reports it.

    ``begin`` and ``end`` are seconds of the executing clock (``time.perf_counter``), ``num_bytes``
    what was moved or written for it. Raises PlacementError for a change that is not allowed.
    """

    block: str
    before: State
    after: State
    reason: str
    begin: float = 0.0
    end: float = 0.0
    num_bytes: int = 0

    def __post_init__(self) -> None:
        if self.after not in ALLOWED[self.before]:
            allowed = ", ".join(sorted(ALLOWED[self.before])) or "nothing"
            raise PlacementError(
                f"block {self.block!r} can't go from {self.before} to {self.after} "
                f"({self.reason}); from {self.before} allowed: {allowed}"
            )

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.begin


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
