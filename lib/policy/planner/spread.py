"""Which members of a group of equal blocks to stream: evenly spread over the order of execution.

A link works while resident blocks compute; a long stretch of resident blocks would fill the few
slots and leave it idle for the rest of the stretch.
"""

from collections.abc import Sequence


def pick_evenly(count: int, chosen: int, phase: float) -> list[int]:
    """Return ``chosen`` of the indices 0 .. count - 1, ascending, at equal distances.

    ``phase`` in [0, 1) says where in the first gap to begin; the order is thought of as a circle.
    """
    return [int((index + phase) * count / chosen) for index in range(chosen)]


def phases(groups: int, variant: int) -> Sequence[float]:
    """Return a phase for each group, so that several groups don't pick the same places.

    Variant 0 puts all in the middle of their gaps, 1 shares the gaps out among the groups, and 2 is
    1 from the end of the gap.
    """
    if variant == 0:
        return [0.5] * groups
    shares = [(index + 0.5) / groups for index in range(groups)]
    return shares if variant == 1 else shares[::-1]
