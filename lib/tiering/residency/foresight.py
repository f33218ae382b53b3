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
        self.asked = 0.0
        """When the present use has asked for what it lacks."""
        self._free = self._gained = 0.0
        """When its reads on demand would have ended, and the seconds gained so far."""

    def clear(self) -> None:
        """Forget what is on its way, and try anew whether it pays; what reads take stays known."""
        self.guesses.clear()
        self.speculation = Speculation()

    def miss(self, layer: int, number: int, unit: Unit) -> None:
        """Hear of an expert that must be read: perhaps since a wrong guess has pushed it out."""
        if self.guesses.take_gone(layer, number):
            self.speculation.lose(self._read_time(unit))

    def begin(self, now: float) -> None:
        """Hear that a use asks for what it lacks."""
        self.asked = self._free = now
        self._gained = 0.0

    def judge(self, layer: int, number: int, ticket: Ticket, begun: float, waited: float) -> None:
        """Learn from a read that was waited for so many seconds.

        On demand this use's reads would have gone one after the other since it asked, and it would
        be behind by what was gained so far.
        """
        usual = self._read_time(ticket.unit)
        foreseen = self.guesses.take_right(layer, number)
        asked = self.asked if foreseen else ticket.asked + self._gained
        self._free = max(self._free, asked) + usual
        gained = max(self._free - begun - self._gained, 0.0) - waited
        self._gained += gained
        self.speculation.gain(gained)
        took = max(ticket.ended - max(ticket.asked, self._last_ended), 0.0)
        self._last_ended = max(self._last_ended, ticket.ended)
        learnt = usual + _LEARNT * (took - usual) if usual else took
        self._read_seconds[ticket.unit.num_bytes] = learnt

    def _read_time(self, unit: Unit) -> float:
        return self._read_seconds.get(unit.num_bytes, 0.0)
