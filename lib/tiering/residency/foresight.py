"""What reading experts ahead has gained and cost, by the clock: whether it goes on, and how far."""

from ...policy.experts.speculation import Speculation
from ..transfer.transport import Ticket, Unit
from .guesses import Guesses

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
        self._last_ended = 0.0

    def clear(self) -> None:
        """Forget what is on its way, and try anew whether it pays; what reads take stays known."""
        self.guesses.clear()
        self.speculation = Speculation()

    def miss(self, layer: int, number: int, unit: Unit) -> None:
        """Hear of an expert that must be read: perhaps since a wrong guess has pushed it out."""
        if self.guesses.take_gone(layer, number):
            self.speculation.lose(self._read_time(unit))

    def judge(self, layer: int, number: int, ticket: Ticket, waited: float, since: float) -> None:
        """Learn from a read that was waited for so many seconds, ``since`` so many after its layer
        had asked: a read on demand would have gone on for as long meanwhile.
        """
        usual = self._read_time(ticket.unit)
        left = max(usual - since, 0.0)
        if self.guesses.take_right(layer, number):
            self.speculation.gain(left - waited)
        elif self.guesses:
            self.speculation.lose(max(waited - left, 0.0))
        took = max(ticket.ended - max(ticket.asked, self._last_ended), 0.0)
        self._last_ended = max(self._last_ended, ticket.ended)
        learnt = usual + _LEARNT * (took - usual) if usual else took
        self._read_seconds[ticket.unit.num_bytes] = learnt

    def _read_time(self, unit: Unit) -> float:
        return self._read_seconds.get(unit.num_bytes, 0.0)
