"""How many tokens to draft before the full weights check them. Pure: data in, data out.

A pass over the full weights takes as long for a window of tokens as for one: what it yields grows
with the window, as long as the draft is right. With an acceptance of a per token a window of k
drafted tokens yields 1 + a + a² + ... + a^k (Leviathan et al. 2023, arXiv:2211.17192, equation 1)
and takes k draft steps and a pass.
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
_FIRST = 1
"""Tokens of the first window while times are unknown; each next one may be twice as long."""


@dataclass(slots=True, kw_only=True)
class Windows:
    """Chooses the length of each window, up to ``longest``, from what was seen so far."""

    longest: int
    _draft_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_TIMES))
    """Of a token."""
    _pass_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_TIMES))
    """Of a pass over the full weights, waiting for them included."""
    _accepted: float = field(default=_PRIOR_ACCEPTED)
    _rejected: float = field(default=_PRIOR_REJECTED)
    _ramp: int = _FIRST

    @property
    def acceptance(self) -> float:
        """The chance that a drafted token is accepted if those before it were."""
        return self._accepted / (self._accepted + self._rejected)

    def begin(self) -> None:
        """Say that another text begins. So that its first words come at once, drafting takes no
        longer than the pass that follows; from then on windows may double.
        """
        self._ramp = _FIRST
        if self._knows_times:
            draft, whole = self._times
            self._ramp = max(_FIRST, min(self.longest, int(whole / max(draft, 1e-12))))

    def choose(self) -> int:
        """Return the number of tokens to draft: that with the most tokens per second."""
        return min(self._ramp, self._best())

    def saw(
        self, accepted: Sequence[int], *, drafted: int, draft_seconds: float, pass_seconds: float
    ) -> None:
        """Hear of a window: of ``drafted`` tokens in each sequence so many were ``accepted``, and
        drafting them and the pass took so many seconds.
        """
        self._ramp = min(self._ramp * 2, self.longest)
        for count in accepted if drafted else ():
            rejected = 1.0 if count < drafted else 0.0
            decay = _FORGETTING ** (count + rejected)
            self._accepted = self._accepted * decay + count
            self._rejected = self._rejected * decay + rejected
        if drafted:
            self._draft_seconds.append(draft_seconds / drafted)
        self._pass_seconds.append(pass_seconds)

    def _best(self) -> int:
        """Return the length with the most tokens per second, at least 1: without a draft nothing
        more would be learned of it.
        """
        if not self._knows_times:
            return self.longest
        draft, whole = self._times
        rates = {
            length: expected_tokens(self.acceptance, length) / max(whole + length * draft, 1e-12)
            for length in range(1, self.longest + 1)
        }
        return max(rates, key=lambda length: rates[length])

    @property
    def _knows_times(self) -> bool:
        return len(self._draft_seconds) >= _LEARNING

    @property
    def _times(self) -> tuple[float, float]:
        """The seconds of a drafted token, and of a pass."""
        return statistics.median(self._draft_seconds), statistics.median(self._pass_seconds)


def expected_tokens(acceptance: float, drafted: int) -> float:
    """Return the tokens that a window yields: those accepted, and one of the pass's own."""
    if acceptance >= 1.0:
        return drafted + 1.0
    return (1.0 - acceptance ** (drafted + 1)) / (1.0 - acceptance)
