"""Whether a calibrated bound still holds for the requests that come: a test that may stop any time.

A share of the requests under a calibrated bound is audited: of one that was answered below full
the KL is measured, and its bound is broken if that is above epsilon. One that was answered at full
has kept its bound, and counts as well: the promise is about all like requests, and among those
released below full alone more than delta may break it. Each audit bets that the bound was broken,
with what the bets before it have left:

    E <- E (1 + b (bad - delta))        E = 1 at first, b = 1 / (1 - delta)

As long as no more than delta of the requests break their bounds, E grows on average not at all,
whatever the order and however long, and so it ever reaches 20 with a chance of at most 1/20 (Ville
1939; Waudby-Smith and Ramdas 2024, JRSS B 86, 1-27). When it does, nothing is released below full
any more, until there is another calibration.

The bet is the one whose E grows fastest (Kelly 1956) where 2 delta break their bounds: each that
does doubles E. In how many audits a workload is caught (``Detection``; at a share of audits s,
divide by s for requests):

    delta    broken    audits on average    with 95 %
    0.05     0.1                     157          423
    0.05     0.2                      34           68
    0.05     0.5                      10           18
    0.05     1                         5            5
    0.01     0.02                    828         2241
    0.01     0.1                      54          103

A rate between delta and 1.45 delta breaks the promise, and may never be caught. Which requests
are audited is drawn beforehand, by number: it can't depend on how they go. As the bet is always the
same, E depends on two counts alone, and not on their order: ``audit_file.py`` keeps them. No torch.
"""

import math
import struct
from dataclasses import dataclass, replace

import xxhash

from ..errors import InputError

STOP_AT = 20.0
"""E at which releasing stops: 1 over the chance of stopping for nothing."""
_HORIZON = 20_000
"""Audits after which a workload that wasn't caught counts as never caught."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditCounts:
    """What the test of one delta has come to: all that its evidence depends on."""

    audits: int = 0
    broken: int = 0
    stopped: bool = False
    """Whether its evidence has ever reached ``STOP_AT``."""

    def add(self, delta: float, *, broken: bool) -> "AuditCounts":
        """Return what one audit more makes of it."""
        more = AuditCounts(audits=self.audits + 1, broken=self.broken + broken)
        stopped = self.stopped or more.log_evidence(delta) >= math.log(STOP_AT)
        return replace(more, stopped=stopped)

    def log_evidence(self, delta: float) -> float:
        """Return log E: 0 at first."""
        won, lost = _log_factors(delta)
        return self.broken * won + (self.audits - self.broken) * lost


class RequestAudit:
    """The test of one calibration's bounds at one delta. Raises InputError for a delta that isn't
    above 0 and below a half, or a share that isn't above 0 and at most 1.

    ``seed``: of the draw of requests that are audited.
    """

    def __init__(self, delta: float, *, share: float, seed: int = 0) -> None:
        _check_delta(delta)
        if not 0 < share <= 1:
            raise InputError(
                f"a share of {share} of requests to audit: give above 0, and at most 1"
            )
        self.delta = delta
        self.share = share
        self.counts = AuditCounts()
        self._seed = seed

    @property
    def stopped(self) -> bool:
        """Whether nothing is released below full any more."""
        return self.counts.stopped

    @property
    def evidence(self) -> float:
        """E: 1 at first."""
        return math.exp(min(self.counts.log_evidence(self.delta), 700.0))

    def is_chosen(self, number: int) -> bool:
        """Say whether a request is audited, by its number alone."""
        drawn = xxhash.xxh3_64_intdigest(struct.pack("<q", number), seed=self._seed)
        return drawn < self.share * 2.0**64

    def record(self, *, broken: bool) -> None:
        """Take an audit into account; once stopped it stays so."""
        self.counts = self.counts.add(self.delta, broken=broken)


@dataclass(frozen=True, slots=True)
class Detection:
    """In how many audits a workload is caught; infinite where it may never be."""

    mean: float
    within: float
    """With the confidence that was asked for."""


def audits_until_stop(rate: float, delta: float, *, confidence: float = 0.95) -> Detection:
    """Return how long a workload goes on of which a share ``rate`` breaks its bounds.

    Exact: the chance of every number of broken ones among those not yet stopped, audit by audit.
    """
    _check_delta(delta)
    won, lost = _log_factors(delta)
    if rate * won + (1 - rate) * lost <= 0:
        return Detection(math.inf, math.inf)
    going = {0: 1.0}  # broken ones -> chance
    mean, within = 0.0, math.inf
    for audits in range(1, _HORIZON):
        mean += math.fsum(going.values())
        then: dict[int, float] = {}
        for broken, chance in going.items():
            for more, share in ((1, rate), (0, 1 - rate)):
                now = broken + more
                if now * won + (audits - now) * lost < math.log(STOP_AT):
                    then[now] = then.get(now, 0.0) + chance * share
        going = {broken: chance for broken, chance in then.items() if chance > 1e-15}
        left = math.fsum(going.values())
        if left <= 1 - confidence and within == math.inf:
            within = audits
        if left < 1e-9:
            return Detection(mean, within)
    return Detection(math.inf, within)


def _check_delta(delta: float) -> None:
    if not 0 < delta < 0.5:
        raise InputError(f"delta is {delta}: an audit takes one above 0 and below a half")


def _log_factors(delta: float) -> tuple[float, float]:
    """Return by what log E changes for a bound that was broken, and for one that held."""
    bet = 1 / (1 - delta)
    return math.log1p(bet * (1 - delta)), math.log1p(-bet * delta)
