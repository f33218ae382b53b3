"""A runtime's transitions as a trace for chrome://tracing or ui.perfetto.dev: what was on its way
when, and what moved for good.

The format is Chrome's trace events: complete events ("X") with times in microseconds. What overlaps
is in lanes of its own, since viewers take events of one lane for nested calls.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..files import write_json
from ..policy.states import Transition
from ..tiering import Runtime
from ..vocabulary import State


def save_trace(runtime: Runtime, path: str | Path) -> int:
    """Write the latest transitions of a runtime; returns how many events there are."""
    document = make_trace(runtime.transitions(), runtime.transitions(streamed=True))
    write_json(document, path)
    return len(document["traceEvents"])


def make_trace(moved: Iterable[Transition], streamed: Iterable[Transition]) -> dict[str, Any]:
    """Return the document. Of what takes no time (bytes below that are there already, the moment in
    which a transfer is asked for) only what leaves fast memory for good is in it, as an instant.
    """
    lanes: list[tuple[str, float]] = []  # what each has, and until when
    events: list[dict[str, Any]] = []
    arriving = [each for each in streamed if each.before is State.IN_FLIGHT]
    for name, transitions in (("streamed", arriving), ("moved", moved)):
        for each in sorted(transitions, key=lambda each: each.begin):
            if each.seconds <= 0 and each.after is State.IN_FLIGHT:
                continue
            event = {
                "name": f"{each.block} {each.before} to {each.after}",
                "cat": name,
                "pid": 1,
                "tid": _free_lane(lanes, name, each) + 1,
                "ts": each.begin * 1e6,
                "args": {"bytes": each.num_bytes, "reason": each.reason},
            }
            if each.seconds > 0:
                events.append({**event, "ph": "X", "dur": each.seconds * 1e6})
            else:
                events.append({**event, "ph": "i", "s": "t"})
    names: list[dict[str, Any]] = [
        {"name": "thread_name", "ph": "M", "pid": 1, "tid": lane + 1, "args": {"name": name}}
        for lane, (name, _) in enumerate(lanes)
    ]
    return {"traceEvents": names + events, "displayTimeUnit": "ms"}


def _free_lane(lanes: list[tuple[str, float]], name: str, transition: Transition) -> int:
    """Return the first lane of that name that is free when a transition begins, and take it."""
    for lane, (own, until) in enumerate(lanes):
        if own == name and until <= transition.begin:
            lanes[lane] = name, transition.end
            return lane
    lanes.append((name, transition.end))
    return len(lanes) - 1
