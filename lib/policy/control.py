"""The controller: which blocks are resident under a budget that changes while the model runs.

    decision = f(state, observation)

on a logical clock: no wall clock, no order of sets, no sums of floats over dicts. The same
observations give the same decisions in any process (``tierhints replay``).

- *Shrink at once.* A limit below what is held demotes, whatever else holds, the blocks whose
  residence is worth least (``score``, ``holding``).
- *Grow after a dwell.* Promotions wait until nothing was demoted for ``dwell_us``, and until there
  is room for ``promote_share`` of the limit; then they come in steps of ``step_bytes``.
- *A bucket of tokens for each block.* A transition takes one; a promotion needs two, so that the
  demotion that may follow has its own. So in any time no block changes more often than
  ``tokens + time / refill_us`` times.
- *Hints of the system* (free memory) lower the limit softly, never below the floor; the operator's
  limit is what is promised.

Nothing here moves anything: a decision becomes state when ``Held`` says that it was carried out.
Precisions stay as they are: what changes is where a block is.
"""

import hashlib
import json
from dataclasses import asdict, dataclass

from .events import (
    Asked,
    Decision,
    Facts,
    Failed,
    Held,
    MemoryHint,
    Move,
    Observation,
    Refuse,
    Replan,
    Tick,
)
from .holding import Holding

POLICY_VERSION = 1
"""Of the rules below: with others the same observations may give other decisions."""
_SMOOTHING = 0.125
"""The weight of the latest ``Tick`` in the share of transfers that is waited for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How eagerly the controller acts. Times are in microseconds.

    ``tokens``: transitions that a block may make in a burst, at least 2; one comes back every
    ``refill_us``. ``step_bytes``: what one decision promotes at most, but for a block that is
    larger by itself.
    """

    dwell_us: int = 2_000_000
    promote_share: float = 0.02
    tokens: int = 4
    refill_us: int = 4_000_000
    step_bytes: int = 32 * 2**20


class Bucket:
    """The transitions that a block may still make."""

    __slots__ = ("_settings", "_tokens", "_since_us")

    def __init__(self, settings: Settings, time_us: int) -> None:
        self._settings = settings
        self._tokens, self._since_us = settings.tokens, time_us

    def count(self, time_us: int) -> int:
        """Return the tokens in it."""
        gained = (time_us - self._since_us) // self._settings.refill_us
        return min(self._tokens + gained, self._settings.tokens)

    def take(self, time_us: int) -> None:
        """Take one; one that was demanded of an empty bucket is forgiven."""
        tokens = self.count(time_us)
        full = tokens == self._settings.tokens
        late = (time_us - self._since_us) % self._settings.refill_us
        self._tokens, self._since_us = max(tokens - 1, 0), time_us if full else time_us - late

    def to_json(self) -> list[int]:
        """Return its state."""
        return [self._tokens, self._since_us]


class Controller:
    """Decides by what it has observed. Not for several threads at once."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.sequence = -1
        """Of the last observation."""
        self.time_us = 0
        self.asked_bytes: int | None = None
        """What the operator allows; None: no limit."""
        self.limit_bytes: int | None = None
        """What is kept to now: growth comes later."""
        self.floor_bytes = 0
        self.holding = Holding()
        self._buckets: dict[str, Bucket] = {}
        self._shrunk_us: int | None = None
        self._soft_bytes: int | None = None
        """The limit that hints of the system have made."""
        self._pressure = 1.0
        self._holds = False
        """What is held is known."""

    def observe(self, observation: Observation) -> Decision | None:
        """Take an observation in, and return what is to be done about it; None: nothing.

        Observations come in the order of their sequence numbers, and time never runs back: both are
        asserted.
        """
        assert observation.sequence == self.sequence + 1, "observations come in order"
        assert observation.time_us >= self.time_us, "time never runs back"
        self.sequence, self.time_us = observation.sequence, observation.time_us
        match observation:
            case Facts():
                self._take_facts(observation)
            case Held():
                self._take_held(observation)
            case Failed():
                self._shrunk_us = self.time_us  # not again before the dwell is over
                if _less(self.asked_bytes, self.limit_bytes):
                    self.asked_bytes = self.limit_bytes
            case Asked():
                return self._answer(observation.limit_bytes)
            case MemoryHint():
                return self._heed(observation.missing_bytes)
            case Tick():
                share = min(max(observation.waited_share, 0.0), 1.0)
                self._pressure += _SMOOTHING * (share - self._pressure)
                return self._grow()
        return None

    @property
    def wants_ticks(self) -> bool:
        """A ``Tick`` may bring a promotion, once its time has come."""
        target = self._target
        if self.holding.replans:
            return self.limit_bytes != target
        return self.limit_bytes != target or self.holding.has_room(target, self._least(target))

    @property
    def is_squeezed(self) -> bool:
        """Hints of the system keep it below what the operator allows."""
        return self._soft_bytes is not None

    @property
    def grows_at_us(self) -> int:
        """From when on a promotion may come."""
        return 0 if self._shrunk_us is None else self._shrunk_us + self.settings.dwell_us

    def digest(self) -> str:
        """Return a hash of the whole state, the same for the same observations."""
        holding = self.holding
        state = {
            "sequence": self.sequence,
            "time_us": self.time_us,
            "limits": [self.asked_bytes, self.limit_bytes, self._soft_bytes, self.floor_bytes],
            "slots": [holding.num_slots, holding.slot_bytes],
            "shrunk_us": self._shrunk_us,
            "pressure": self._pressure,
            "settings": asdict(self.settings),
            "tiers": list(holding.tiers.items()),
            "buckets": [[name, *bucket.to_json()] for name, bucket in self._buckets.items()],
        }
        return hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]

    # -- state -------------------------------------------------------------------------------------

    def _take_facts(self, facts: Facts) -> None:
        """Learn what there is; blocks that were known keep their tokens."""
        self.floor_bytes = facts.floor_bytes
        self.holding.take_facts(facts)
        known, self._buckets = self._buckets, {}
        for name in self.holding.blocks:
            self._buckets[name] = known.get(name) or Bucket(self.settings, self.time_us)

    def _take_held(self, held: Held) -> None:
        """Learn what is held: each change of a block's place takes one of its tokens."""
        before = self.holding.fast_bytes
        changed = self.holding.take_held(held)
        for name in changed:
            self._buckets[name].take(self.time_us)
        shrank = bool(changed) and self.holding.fast_bytes < before
        if self._holds and (shrank or _less(held.limit_bytes, self.limit_bytes)):
            self._shrunk_us = self.time_us
        if not held.decided and (not self._holds or held.limit_bytes != self.limit_bytes):
            self.asked_bytes = held.limit_bytes  # somebody else has set another budget
        self.limit_bytes, self._holds = held.limit_bytes, True

    # -- decisions ---------------------------------------------------------------------------------

    def _answer(self, limit: int | None) -> Decision | None:
        """Answer the operator."""
        if limit is not None and limit < self.floor_bytes:
            reason = f"{limit} bytes are below the floor of {self.floor_bytes}"
            return Refuse(reason=reason, limit_bytes=limit, floor_bytes=self.floor_bytes)
        self.asked_bytes = limit
        if limit is not None and _less(limit, self.limit_bytes):
            return self._shrink(limit, "the operator's limit")
        return self._grow()

    def _heed(self, missing: int) -> Decision | None:
        """Let the soft limit follow a hint: down by what is missing, up after the dwell."""
        taken = self.holding.fast_bytes
        if missing > 0:
            soft = max(taken - missing, self.floor_bytes)
            if soft >= taken:
                return None
            self._soft_bytes = soft
            return self._shrink(soft, f"{missing} bytes are missing in the system")
        if self._soft_bytes is not None and self._dwelt:
            raised = self._soft_bytes - missing
            self._soft_bytes = raised if _less(raised, self.asked_bytes) else None
        return None

    @property
    def _dwelt(self) -> bool:
        return self.time_us >= self.grows_at_us

    @property
    def _target(self) -> int | None:
        """What fast memory may grow to."""
        return self._soft_bytes if _less(self._soft_bytes, self.asked_bytes) else self.asked_bytes

    def _shrink(self, limit: int, reason: str) -> Decision:
        """Demote what is worth least until the limit holds."""
        replans = self.holding.replans
        demotion = None if replans else self.holding.demote(limit, self._pressure)
        if demotion is None:
            return Replan(reason=f"{reason}; single moves don't get there", limit_bytes=limit)
        return Move(
            reason=reason,
            demote=demotion.places,
            promote=(),
            num_slots=demotion.num_slots,
            slot_bytes=demotion.slot_bytes,
            limit_bytes=limit,
        )

    def _least(self, target: int | None) -> int:
        """Return the room from which on something is promoted."""
        return 0 if target is None else round(self.settings.promote_share * target)

    def _grow(self) -> Decision | None:
        """Promote what is worth most, where there is room and the dwell is over."""
        target, holding = self._target, self.holding
        if not self._dwelt or not self._holds or _less(target, holding.fast_bytes):
            return None
        if holding.replans:
            if self.limit_bytes == target:
                return None
            return Replan(reason="there is room, after the dwell", limit_bytes=target)
        may = [each for each in holding.away if self._buckets[each.name].count(self.time_us) > 1]
        promoted = holding.promote(
            None if target is None else target - holding.fast_bytes,
            self.settings.step_bytes,
            self._least(target),
            may,
            self._pressure,
        )
        if not promoted and self.limit_bytes == target:
            return None
        arriving = {facts.name for facts in promoted}
        still_away = [facts for facts in holding.away if facts.name not in arriving]
        num_slots, slot_bytes = holding.slots_for(still_away, holding.num_slots)
        return Move(
            reason="there is room, and nothing has left for the dwell",
            demote=(),
            promote=tuple(facts.name for facts in promoted),
            num_slots=num_slots,
            slot_bytes=slot_bytes,
            limit_bytes=target,
        )


def _less(limit: int | None, other: int | None) -> bool:
    """Compare two limits, of which None is the largest."""
    return limit is not None and (other is None or limit < other)
