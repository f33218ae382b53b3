"""How many tokens to draft before the full weights check them. Pure: data in, data out.

A pass over the full weights takes as long for a window of tokens as for one: what it yields grows
with the window, as long as the draft is right. With an acceptance of a per token a window of k
drafted tokens yields 1 + a + a² + ... + a^k (Leviathan et al. 2023, arXiv:2211.17192, equation 1)
and takes k draft steps and a pass.

The draft may go on while the pass runs; each slows the other. What it drafts then begins the next
window if all of this one and the token after it are accepted. Measured times of both ways say
whether that is worth it.
"""

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

_PRIOR_ACCEPTED = 18.0
_PRIOR_REJECTED = 2.0
"""What is taken as seen before anything was: of twenty tokens two were rejected."""
_FORGETTING = 0.98
"""What is left of earlier tokens' weight with each token: about fifty of them count."""
_TIMES = 5
"""Of so many latest times the median counts: compiling, or another process, takes one of them."""
_LEARNING = 3
"""Windows after which the times are taken to be known."""
_OTHER_WAY = 16
"""Windows after which the way that isn't the faster one is tried again: others use the machine."""
_LEAST_GAIN = 1.02
"""What going on must promise, were it free, to be tried."""
_FIRST = 1
"""Tokens of the first window while times are unknown; each next one may be twice as long."""


@dataclass(slots=True, kw_only=True)
class Windows:
    """Chooses the length of each window, up to ``longest``, from what was seen so far."""

    longest: int
    _draft_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_TIMES))
    """Of a token."""
    _pass_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_TIMES))
    """Of a pass over the full weights, waiting for them included, while the draft rests."""
    _beside_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_TIMES))
    """Of a pass while the draft goes on."""
    _step_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_TIMES))
    """Of a token that is drafted then."""
    _accepted: float = field(default=_PRIOR_ACCEPTED)
    _rejected: float = field(default=_PRIOR_REJECTED)
    _ramp: int = _FIRST
    _sequences: int = 1
    """Of a batch, those that have not ended."""
    _since: dict[bool, int] = field(default_factory=lambda: {False: 0, True: 0})
    """Windows since the draft rested (False), or went on (True), during a pass."""

    @property
    def acceptance(self) -> float:
        """The chance that a drafted token is accepted if those before it were."""
        return self._accepted / (self._accepted + self._rejected)

    def begin(self, sequences: int = 1) -> None:
        """Say that another text begins, or a batch of them. So that its first words come at once,
        drafting takes no longer than the pass that follows; from then on windows may double.
        """
        self._sequences = sequences
        self._ramp = _FIRST
        if self._knows_times:
            fitting = int(self._pass / max(self._draft, 1e-12))
            self._ramp = max(_FIRST, min(self.longest, fitting))

    def choose(self) -> int:
        """Return the number of tokens to draft: that with the most tokens per second. At least 1:
        without a draft nothing more would be learned of it.
        """
        if not self._knows_times:
            return min(self._ramp, self.longest)
        times = self._times_beside if self.goes_on() else (self._pass, None)
        return min(self._ramp, self._best(*times)[1])

    def goes_on(self) -> bool:
        """Say whether the draft goes on while the next pass runs: where that gives more tokens per
        second, and now and then where it might.
        """
        if not self._knows_times:
            return False
        rests = self._best(self._pass)[0]
        may_gain = self._best(self._pass, self._draft)[0] > _LEAST_GAIN * rests
        if len(self._beside_seconds) < _LEARNING:
            return may_gain
        gains = self._best(*self._times_beside)[0] > rests
        if self._since[not gains] < _OTHER_WAY:
            return gains
        return may_gain and not gains

    def saw(
        self,
        accepted: Sequence[int],
        *,
        drafted: int,
        draft_seconds: float,
        pass_seconds: float,
        held: int = 0,
        beside: tuple[int, float] | None = None,
    ) -> None:
        """Hear of a window: of ``drafted`` tokens in each sequence so many were ``accepted``, and
        drafting them and the pass took so many seconds. ``held``: of the drafted ones, those that
        were there already; ``beside``: tokens drafted while the pass ran, and their seconds; None:
        the draft rested.
        """
        self._ramp = min(self._ramp * 2, self.longest)
        self._sequences = len(accepted) or self._sequences
        for count in accepted if drafted else ():
            rejected = 1.0 if count < drafted else 0.0
            decay = _FORGETTING ** (count + rejected)
            self._accepted = self._accepted * decay + count
            self._rejected = self._rejected * decay + rejected
        if drafted > held:
            self._draft_seconds.append(draft_seconds / (drafted - held))
        went_on = beside is not None
        (self._beside_seconds if went_on else self._pass_seconds).append(pass_seconds)
        if beside is not None and beside[0]:
            self._step_seconds.append(beside[1] / beside[0])
        self._since = {went_on: 0, not went_on: self._since[not went_on] + 1}

    def _best(self, whole: float, step: float | None = None) -> tuple[float, int]:
        """Return the most tokens per second of a sequence, and the length of the windows that give
        them, where a pass takes so many seconds, and a token drafted meanwhile; None: none is.
        """
        draft, rates = self._draft, {}
        for length in range(1, self.longest + 1):
            there = 0.0
            if step is not None:  # the first one has to be the pass's own
                there = min(max(whole / max(step, 1e-12) - 1.0, 0.0), length)
                there *= self.acceptance ** ((length + 1) * self._sequences)
            seconds = whole + (length - there) * draft
            rates[length] = expected_tokens(self.acceptance, length) / max(seconds, 1e-12)
        best = max(rates, key=lambda length: rates[length])
        return rates[best], best

    @property
    def _knows_times(self) -> bool:
        return len(self._draft_seconds) >= _LEARNING and len(self._pass_seconds) > 0

    @property
    def _draft(self) -> float:
        """Seconds of a drafted token, while the full weights rest."""
        return statistics.median(self._draft_seconds)

    @property
    def _pass(self) -> float:
        """Seconds of a pass, while the draft rests."""
        return statistics.median(self._pass_seconds)

    @property
    def _times_beside(self) -> tuple[float, float | None]:
        """Seconds of a pass while the draft goes on, and of a token that is drafted then."""
        if not self._step_seconds:
            return self._pass, None
        return statistics.median(self._beside_seconds), statistics.median(self._step_seconds)


def expected_tokens(acceptance: float, drafted: int) -> float:
    """Return the tokens that a window yields: those accepted, and one of the pass's own."""
    if acceptance >= 1.0:
        return drafted + 1.0
    return (1.0 - acceptance ** (drafted + 1)) / (1.0 - acceptance)
