"""What running requests will probably come to take, by those that came before. Pure: no torch.

Who is admitted because he fits now stands still later, when all texts have grown. So admission asks
for the *projected peak* (the past-future scheduler: Gong et al. 2025, LightLLM, arXiv:2507.10150).
With a token for each running text in each step, s steps on they take on average

    Σ_i P_i(s) ((1 - q_i) own_i(s) + q_i top_i(s))

with own and top what a text of s more tokens holds at its tier and at its top tier, q_i the chance
that it climbs yet, and P_i(s) the chance that its answer gets so long: by the lengths of answers
that have ended, given the tokens that it has; 1 up to its cap as long as none ended before its own.
The peak is the largest sum over all steps, two standard deviations added. Of full states it would
be enough to look where answers end; compact texts get smaller whenever a page is made.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from .decisions import Account, Sizes
from .ladder import SINK_TOKENS
from .reserve import EscalationRates, probable_bytes

_LATEST = 512
"""Answers whose lengths count."""
_PATIENCE = 16
"""Steps after which those that didn't fit are looked at again, if nothing else happens."""
_DEVIATIONS = 2.0
"""Added to the average: with 1 or none more stand still, and fewer go on."""


class Outlook:
    """Expects of requests what earlier ones did. ``quantile``: of what climbs will take together,
    for the soft reserve. ``history``: as ``EscalationRates`` has it.
    """

    def __init__(
        self, sizes: Sizes, *, quantile: float, history: Mapping[str, tuple[int, int]] | None = None
    ) -> None:
        self.rates = EscalationRates(history)
        self.lengths = AnswerLengths()
        self._sizes = sizes
        self._quantile = quantile
        self._tables: dict[tuple[int, bool], NDArray[np.float64]] = {}
        self._refused: object = None

    def count(self, request: Account, *, cancelled: bool) -> None:
        """Hear that a request has ended: by itself, unless that was at its cap or ``cancelled``."""
        last = 1 + (self._sizes.window if request.drafts else 0)
        ended = not cancelled and request.tokens + last < request.cap
        self.lengths.count(request.new_tokens, ended=ended)
        if not cancelled:
            self.decide(request, climbed=False)

    def decide(self, request: Account, *, climbed: bool) -> None:
        """Hear that a request has climbed, or will not; the first time counts."""
        if not request.decided:
            self.rates.count(request.kind, climbed=climbed)
            request.decided = True

    def soft_reserve(self, running: Sequence[Account], budget_bytes: int) -> int:
        """Return what climbs will probably take now, of those that wait where there is no room."""
        climbs = [
            (self._sizes.climb(each), self._chance(each)) for each in running if not each.drafts
        ]
        return probable_bytes(climbs, quantile=self._quantile, budget_bytes=budget_bytes)

    def fits(self, running: Sequence[Account], budget_bytes: int) -> bool:
        """Say whether the projected peak is within a budget. A no stands while the same ones run,
        for some more steps.
        """
        paces = sum(each.length for each in running) // (_PATIENCE * len(running))
        asked = budget_bytes, paces, [(each.id, each.tier, each.top) for each in running]
        if asked == self._refused:
            return False
        fit = self.peak_bytes(running) <= budget_bytes
        self._refused = None if fit else asked
        return fit

    def peak_bytes(self, running: Sequence[Account]) -> int:
        """Return the projected peak."""
        if self._sizes.portion is None:  # they hold it from the beginning on
            return sum(each.held for each in running)
        steps = 1 + max((each.cap - each.length for each in running), default=0)
        mean, variance = np.zeros(steps), np.zeros(steps)
        for each in running:
            goes_on = self.lengths.chances(each.new_tokens, each.cap - each.length)
            chance = self._chance(each)
            own = self._held(each, each.tier)
            top = self._held(each, each.top) if chance else own
            expected = goes_on * (own + chance * (top - own))
            mean[: len(own)] += expected
            variance[: len(own)] += goes_on * (own**2 + chance * (top**2 - own**2)) - expected**2
        return math.ceil(float((mean + _DEVIATIONS * np.sqrt(variance.clip(0))).max()))

    def _chance(self, request: Account) -> float:
        """Return the chance that a request climbs yet. Of one that needn't it is taken as it was
        seen; of others it is no less than that.
        """
        if request.tier == request.top:
            return 0.0
        rate = self.rates.seen if request.drafts else self.rates.upper
        return rate(request.kind) * request.left

    def _held(self, request: Account, tier: int) -> NDArray[np.float64]:
        """Return the bytes that a text holds at a tier, from its length to its cap."""
        key = tier, request.drafts
        table = self._tables.get(key, np.zeros(0))
        if len(table) <= request.cap:
            portion = self._sizes.portion
            assert portion is not None
            last = max(request.cap, 2 * len(table)) + portion
            rooms = range(SINK_TOKENS, last, portion)
            held = [self._sizes.in_portion(each, tier, drafts=request.drafts) for each in rooms]
            lengths = [SINK_TOKENS + 1] + [portion] * (len(held) - 1)  # in each of them, from 0 on
            table = self._tables[key] = np.repeat(np.array(held, dtype=np.float64), lengths)
        whole = self._sizes.whole(request, tier)  # at its cap a portion is cut off
        return np.minimum(table[request.length : request.cap + 1], whole)


class AnswerLengths:
    """How long answers get: of the latest, the tokens, and whether they ended or were cut off."""

    def __init__(self, answers: Iterable[tuple[int, bool]] = ()) -> None:
        self._answers = deque(answers, maxlen=_LATEST)
        self._reached: NDArray[np.float64] | None = None

    def count(self, tokens: int, *, ended: bool) -> None:
        """Take an answer into account that ended; else it would have got longer."""
        self._answers.append((tokens, ended))
        self._reached = None

    def chances(self, tokens: int, more: int) -> NDArray[np.float64]:
        """Return the chances that an answer of so many tokens gets 0, 1, ... ``more`` tokens.

        Kaplan and Meier's estimate (1958), with one that goes on added to those that got to each
        length, so that none is certain to end; longer than any seen, it goes on to its cap.
        """
        if self._reached is None:
            self._reached = self._estimate()
        places = np.arange(tokens, tokens + more + 1).clip(max=len(self._reached) - 1)
        chances: NDArray[np.float64] = self._reached[places] / self._reached[places[0]]
        return chances

    def _estimate(self) -> NDArray[np.float64]:
        ends = [tokens for tokens, ended in self._answers if ended]
        longest = max(ends, default=0)
        at_risk = np.zeros(longest + 1)
        for tokens, _ in self._answers:
            at_risk[: tokens + 1] += 1
        goes_on = 1 - np.bincount(ends, minlength=longest + 1) / (at_risk + 1)
        return np.concatenate([[1.0], goes_on.cumprod()])
