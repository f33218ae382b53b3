"""What reading experts ahead has gained and cost, by the clock: whether it goes on, and how far."""

from collections.abc import Sequence

from ...policy.experts import Expert
from ...policy.experts.speculation import Speculation
from ..transfer.transport import Ticket, Unit
from .held_expert import HeldExpert

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
        self.guessed: dict[HeldExpert, None] = {}
        """Read ahead, and not used yet."""
        self._gone: dict[Expert, None] = {}
        """Evicted for what was read ahead."""
        self._read_seconds: dict[int, float] = {}
        """What a read takes lately, by its bytes."""
        self._lateness = 0.0
        self._last_ended = 0.0

    @property
    def reads_late(self) -> bool:
        """What is read ahead for the layer that begins mostly comes too late."""
        return self._lateness > _LATE

    def clear(self) -> None:
        """Forget what is on its way; what reads take stays known."""
        self.guessed.clear()
        self._gone.clear()

    def guess(self, expert: HeldExpert, evicted: Sequence[Expert]) -> None:
        """Note what is read ahead, and what went for it."""
        self.guessed[expert] = None
        self._gone |= dict.fromkeys(evicted)

    def miss(self, expert: Expert, unit: Unit) -> None:
        """Hear of an expert that must be read: perhaps since a guess has pushed it out."""
        if expert in self._gone:
            del self._gone[expert]
            self.speculation.lose(self._read_time(unit))

    def judge(self, expert: HeldExpert, ticket: Ticket, waited: float) -> None:
        """Learn from a read that was waited for so many seconds."""
        usual = self._read_time(ticket.unit)
        if expert in self.guessed:
            del self.guessed[expert]
            self.speculation.gain(usual - waited)
            late = waited > _LATE * usual
            self._lateness += _LEARNT * (late - self._lateness)
        elif self.guessed:
            self.speculation.lose(max(waited - usual, 0.0))
        took = ticket.ended - max(ticket.asked, self._last_ended)
        self._last_ended = ticket.ended
        learnt = usual + _LEARNT * (took - usual) if usual else took
        self._read_seconds[ticket.unit.num_bytes] = learnt

    def _read_time(self, unit: Unit) -> float:
        return self._read_seconds.get(unit.num_bytes, 0.0)
