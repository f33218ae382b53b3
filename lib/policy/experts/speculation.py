"""Whether reading ahead pays, by what it was measured to gain.

A use that a read ahead served has gained the time that it would have waited on demand; one that
waited for a wrong guess to end has lost that time, and so has one for an expert that was evicted
for a guess. While the balance of the last uses is not positive no guess is read, but for a short
trial now and then.
"""

_TRIAL = 64
"""Guesses read before the balance is believed, and in each trial later."""

_PAUSE = 16
"""A pause is so many trials long, counted in guesses not read."""

_FADE = 1 - 1 / 256
"""What the balance keeps of itself per guess."""


class Speculation:
    """The balance of reading ahead in seconds; decided by counts, whatever the clock says."""

    def __init__(self) -> None:
        self.balance = 0.0
        self._is_on = True
        self._trial = _TRIAL
        self._paused = 0

    def wants(self) -> bool:
        """Say whether to read the next guess ahead; counts it."""
        self.balance *= _FADE
        if self._trial:
            self._trial -= 1
        elif self.balance <= 0:
            self._paused += 1
            if self._paused == _PAUSE * _TRIAL:
                self._paused, self._trial, self.balance = 0, _TRIAL, 0.0
            self._is_on = False
            return False
        self._is_on = True
        return True

    def gain(self, seconds: float) -> None:
        """A use waited so much less, or more (negative), than it would have on demand. Without
        guesses that is chance.
        """
        if self._is_on:
            self.balance += seconds

    def lose(self, seconds: float) -> None:
        """Guessing took so long, or reading anew what a guess evicted."""
        self.balance -= seconds
