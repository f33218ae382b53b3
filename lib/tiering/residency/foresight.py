"""What reading experts ahead has gained and cost, by the clock: whether it goes on, and how far."""

from ...policy.experts.speculation import Speculation
from ..transfer.transport import Ticket, Unit
from .guesses import Guesses

_LATE = 0.25
"""Share of a read's time that may be waited for what was read ahead, and of the reads that may be
late.
"""
_LEARNT = 0.1
"""Weight of the latest read in what is known of reads."""


class Foresight:
    """The experts that were read ahead and not used yet, and how it went with those before."""

    def __init__(self) -> None:
        self.speculation = Speculation()
        """Whether reading ahead pays."""
        self.guesses = Guesses()
        """What is read ahead."""
        self._read_seconds: dict[int, float] = {}
        """What a read takes lately, by its bytes."""
        self._lateness = 0.0
        self._last_ended = 0.0

    @property
    def reads_late(self) -> bool:
        """What is read ahead for the layer that begins mostly comes too late."""
        return self._lateness > _LATE

    def clear(self) -> None:
        """Forget what is on its way, and try anew whether it pays; what reads take stays known."""
        self.guesses.clear()
        self.speculation = Speculation()

    def miss(self, layer: int, number: int, unit: Unit) -> None:
        """Hear of an expert that must be read: perhaps since a wrong guess has pushed it out."""
        if self.guesses.take_gone(layer, number):
            self.speculation.lose(self._read_time(unit))

    def judge(self, layer: int, number: int, ticket: Ticket, waited: float) -> None:
        """Learn from a read that was waited for so many seconds."""
        usual = self._read_time(ticket.unit)
        if self.guesses.take_right(layer, number):
            self.speculation.gain(usual - waited)
            late = waited > _LATE * usual
            self._lateness += _LEARNT * (late - self._lateness)
        elif self.guesses:
            self.speculation.lose(max(waited - usual, 0.0))
        took = max(ticket.ended - max(ticket.asked, self._last_ended), 0.0)
        self._last_ended = max(self._last_ended, ticket.ended)
        learnt = usual + _LEARNT * (took - usual) if usual else took
        self._read_seconds[ticket.unit.num_bytes] = learnt

    def _read_time(self, unit: Unit) -> float:
        return self._read_seconds.get(unit.num_bytes, 0.0)
