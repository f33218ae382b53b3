"""What a block's residence is worth: one function, whose terms have names.

    value = likelihood / (reuse_horizon + next_use) * (pressure * transfer + decode) / bytes
            + quality_cost

in seconds per byte of fast memory, saved per pass. A block that every pass uses has the horizon 1
and the likelihood 1; an expert has the likelihood with which it is routed to. A transfer costs what
the link's pressure makes of it: where compute hides all of them, only the decoding.
"""

from dataclasses import dataclass

LEAST_PRESSURE = 0.05
"""A link that compute hides today may be waited for tomorrow: a transfer is never worth nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What the score of one block is made of.

    ``transfer_seconds``: of its link in a pass; ``decode_seconds``: of expanding what it brought,
    if that isn't done for a resident block, too. ``reuse_horizon``: passes from one use to the
    next, at least 1; ``next_use``: passes until its next, 0 in a decision that is to hold for many;
    ``likelihood`` in [0, 1] of that use. ``pressure`` in [0, 1]: the share of transfers that is
    waited for. ``quality_cost``: seconds per byte that holding it less precisely would be worth,
    the nats that it would cost divided by the exchange rate; 0 where the precision stays.
    """

    num_bytes: int
    transfer_seconds: float
    decode_seconds: float = 0.0
    reuse_horizon: float = 1.0
    next_use: float = 0.0
    likelihood: float = 1.0
    pressure: float = 1.0
    quality_cost: float = 0.0


def score(terms: Terms) -> float:
    """Return what residence is worth, in seconds per byte and pass; the least leaves first."""
    seconds = max(terms.pressure, LEAST_PRESSURE) * terms.transfer_seconds + terms.decode_seconds
    rate = terms.likelihood / (max(terms.reuse_horizon, 1.0) + terms.next_use)
    return rate * seconds / max(terms.num_bytes, 1) + terms.quality_cost
