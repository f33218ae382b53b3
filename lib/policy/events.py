"""What the controller hears and what it answers: records with a sequence number and a time, in the
form in which they are logged.

Times are whole microseconds of a logical clock: the time that passed until an observation was made
enters as part of it, and nothing else does. A log of observations therefore gives the same
decisions anywhere (``control.Controller``).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import InputError
from ..vocabulary import Tier

SCHEMA_VERSION = 1
"""Of the records below: a log of another version isn't read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFacts:
    """What the controller knows of a block, which doesn't change while it is held in one precision.

    ``places``: its full uses in the order of a pass; empty: it is looked up only, or not used.
    ``unit_bytes``: the transfers of a full use; ``lookup_bytes``: what a lookup moves.
    ``transfer_seconds``: of the link per pass, from the slowest tier that it may be in;
    ``compute_seconds``: of one full use. ``importance``: the hints'; 0 if unknown.
    """

    name: str
    resident_bytes: int
    stored_bytes: int
    unit_bytes: tuple[int, ...]
    must_reside: bool
    places: tuple[int, ...]
    transfer_seconds: float
    compute_seconds: float
    importance: float
    lookup_bytes: int = 0

    @property
    def slot_bytes(self) -> int:
        """The smallest slot through which it streams; 0: it needs none."""
        return max(self.unit_bytes, default=0) if self.places else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """Something that was seen, at a time in microseconds since the controller began."""

    sequence: int
    time_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts(Observation):
    """What is to be placed. ``floor_bytes``: the smallest budget that the planner can plan for;
    ``below``: the tiers below fast memory, fastest first, and what each may hold (None: no limit).
    ``replans``: there are experts, which a plan may cache, so that single moves don't make one.
    """

    blocks: tuple[BlockFacts, ...]
    floor_bytes: int
    scratch_bytes: int
    below: tuple[tuple[Tier, int | None], ...]
    replans: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Held(Observation):
    """What is held from now on, whoever has decided it: the tier of each block, in the order of the
    facts, and the slots beside them. ``limit_bytes``: what fast memory may take; None: no limit.
    ``decided``: it is what the controller has decided; ``cache_bytes``: what a cache of experts
    takes.
    """

    tiers: tuple[Tier, ...]
    num_slots: int
    slot_bytes: int
    limit_bytes: int | None
    decided: bool
    cache_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked(Observation):
    """An operator asks for another budget of fast memory; None: no limit."""

    limit_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick(Observation):
    """Time has passed: a forward begins. ``waited_share``: of the transfers since the last one,
    the share that was waited for.
    """

    waited_share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryHint(Observation):
    """A slow figure of the system: how many bytes are missing until the reserve is free again
    (negative: so many are free beyond it).
    """

    missing_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed(Observation):
    """A decision could not be carried out; what was held before is held."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What is to be done about an observation."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Move(Decision):
    """Blocks change places: ``demote`` to these tiers, ``promote`` into fast memory; with these
    slots, and within this limit.
    """

    demote: tuple[tuple[str, Tier], ...]
    promote: tuple[str, ...]
    num_slots: int
    slot_bytes: int
    limit_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Replan(Decision):
    """No set of single moves gets there: the planner is to find another layout for this limit."""

    limit_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuse(Decision):
    """The limit is below the floor: nothing changes."""

    limit_bytes: int
    floor_bytes: int


_OBSERVATIONS: dict[str, type[Observation]] = {
    kind.__name__: kind for kind in (Facts, Held, Asked, Tick, MemoryHint, Failed)
}


def write_event(event: Observation | Decision) -> dict[str, Any]:
    """Return an event as plain JSON types."""
    return {"kind": type(event).__name__, **asdict(event)}


def read_observation(record: Mapping[str, Any]) -> Observation:
    """Read what ``write_event`` wrote of an observation; raises InputError."""
    values = dict(record)
    kind = values.pop("kind", None)
    if kind not in _OBSERVATIONS:
        raise InputError(f"observation of kind {kind!r}; there are: {', '.join(_OBSERVATIONS)}")
    known = _OBSERVATIONS[kind]
    names = {field.name for field in fields(known)}
    if values.keys() != names:
        odd = sorted(values.keys() ^ names)
        raise InputError(f"observation {kind}: field {odd[0]!r} is missing, or unknown")
    if kind == "Facts":
        values["blocks"] = tuple(_read_block(block) for block in values["blocks"])
        values["below"] = tuple((Tier(tier), size) for tier, size in values["below"])
    elif kind == "Held":
        values["tiers"] = tuple(map(Tier, values["tiers"]))
    return known(**values)


def _read_block(record: Mapping[str, Any]) -> BlockFacts:
    values = dict(record)
    for name in ("unit_bytes", "places"):
        values[name] = tuple(values[name])
    return BlockFacts(**values)
