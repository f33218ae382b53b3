"""What a count says about a chance, exactly: limits of a proportion, and which of n draws covers.

Limits are those of Clopper and Pearson (1934, Biometrika 26, 404-413): the chances at which a count
as extreme as the one seen is just as likely as the error that is allowed. The rank that covers is
Wilks' (1941, Ann. Math. Statist. 12, 91-96). No torch.
"""

import math
from functools import lru_cache

from ..errors import InputError


def at_most(hits: int, count: int, chance: float) -> float:
    """Return P(Binomial(count, chance) <= hits)."""
    if hits < 0:
        return 0.0
    if hits >= count or chance <= 0:
        return 1.0
    if chance >= 1:
        return 0.0
    total = math.lgamma(count + 1)
    yes, no = math.log(chance), math.log1p(-chance)
    return min(
        1.0,
        math.fsum(
            math.exp(
                total - math.lgamma(k + 1) - math.lgamma(count - k + 1) + k * yes + (count - k) * no
            )
            for k in range(hits + 1)
        ),
    )


@lru_cache(4096)
def upper_limit(hits: int, count: int, confidence: float = 0.95) -> float:
    """Return the chance that is above the true one with a confidence; 1 for a count of 0.

    Raises InputError for what isn't a count of hits.
    """
    if not 0 <= hits <= count:
        raise InputError(f"{hits} hits of {count}: give 0 to as many as there were")
    low, high = hits / count if count else 1.0, 1.0
    while high - low > 1e-12:
        middle = (low + high) / 2
        if at_most(hits, count, middle) > 1 - confidence:
            low = middle
        else:
            high = middle
    return high


def proportion_interval(hits: int, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the limits below and above a true chance, that together hold with a confidence."""
    each = (1 + confidence) / 2
    return 1 - upper_limit(count - hits, count, each), upper_limit(hits, count, each)


def covering_rank(count: int, coverage: float, confidence: float) -> int | None:
    """Return the least k so that the k-th smallest of ``count`` draws covers: with the confidence,
    a share of ``coverage`` at least of what they were drawn from isn't above it. None: too few
    draws (``least_count``).
    """
    rank = None
    for above in range(count):  # as many draws may be above it
        if at_most(above, count, 1 - coverage) > 1 - confidence:
            break
        rank = count - above
    return rank


def least_count(coverage: float, confidence: float) -> int:
    """Return the least count of draws of which the largest covers."""
    count = max(1, math.floor(math.log(1 - confidence) / math.log(coverage)))
    while covering_rank(count, coverage, confidence) is None:
        count += 1
    return count
