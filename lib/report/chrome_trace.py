"""A runtime's transitions as a trace for chrome://tracing or ui.perfetto.dev: what was on its way
when, and what moved for good.

The format is Chrome's trace events: complete events ("X") with times in microseconds.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..files import write_json
from ..policy.states import Transition
from ..tiering import Runtime
from ..vocabulary import State

_LANES = {"streamed": 1, "moved": 2}


def save_trace(runtime: Runtime, path: str | Path) -> int:
    """Write the latest transitions of a runtime; returns how many events there are."""
    document = make_trace(runtime.transitions(), runtime.transitions(streamed=True))
    write_json(document, path)
    return len(document["traceEvents"])


def make_trace(moved: Iterable[Transition], streamed: Iterable[Transition]) -> dict[str, Any]:
    """Return the document. Of what takes no time (bytes below that are there already, the moment in
    which a transfer is asked for) only what leaves fast memory for good is in it, as an instant.
    """
    events: list[dict[str, Any]] = [
        {"name": "thread_name", "ph": "M", "pid": 1, "tid": lane, "args": {"name": name}}
        for name, lane in _LANES.items()
    ]
    for name, transitions in (("streamed", streamed), ("moved", moved)):
        for each in transitions:
            if each.before is not State.IN_FLIGHT and name == "streamed":
                continue
            event = {
                "name": f"{each.block} {each.before} to {each.after}",
                "cat": name,
                "pid": 1,
                "tid": _LANES[name],
                "ts": each.begin * 1e6,
                "args": {"bytes": each.num_bytes, "reason": each.reason},
            }
            if each.seconds > 0:
                events.append({**event, "ph": "X", "dur": each.seconds * 1e6})
            elif each.after is not State.IN_FLIGHT:
                events.append({**event, "ph": "i", "s": "t"})
    return {"traceEvents": events, "displayTimeUnit": "ms"}
