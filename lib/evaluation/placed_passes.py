"""What a runtime did in timed passes, as the benchmark's document has it."""

import math
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from ..policy.states import Transition
from ..tiering import Runtime
from ..tiering.telemetry import Stats, transfer_ms
from ..vocabulary import State

_FEW_PASSES = 3
"""Whose course is kept in the document; the pattern repeats."""
_MOST_STAYS = 2_000
"""Of blocks in slots that a document has."""


def describe_passes(stats: Stats) -> dict[str, Any]:
    """Return what the runtime did per pass, and its own figures, the timeline cut to few passes."""
    document = stats.to_json()
    timeline = document["timeline"]
    few = timeline[: math.ceil(len(timeline) / stats.forwards) * _FEW_PASSES]
    changes = [now for last, now in zip([(), *few], few, strict=False) if last[1:] != now[1:]]
    return {
        "bytes_moved_per_forward": round(stats.bytes_moved / stats.forwards),
        "transfer_ms_per_forward": transfer_ms(document),
        "stats": {**document, "timeline": changes},
    }


def describe_stays(runtime: Runtime, seconds: Sequence[float]) -> dict[str, Any] | None:
    """Return when blocks came into slots and left them in the last few of the passes that have just
    ended, which took so many ``seconds``; None in emulation, where nothing moves.

    ``stays`` holds by block, in the order in which they came first, (asked for, there, left) in
    seconds since the first of these passes began; left is None for what was still there.
    """
    if runtime.mode != "real":
        return None
    few = list(seconds[-_FEW_PASSES:])
    since = time.perf_counter() - sum(few)
    return {
        "pass_seconds": few,
        "stays": find_stays(runtime.transitions(streamed=True), since=since),
    }


def find_stays(
    streamed: Sequence[Transition], *, since: float
) -> dict[str, list[tuple[float, float, float | None]]]:
    """Return the stays of ``describe_stays`` from transitions in the order of their ends: of those
    that lasted beyond ``since`` the latest.
    """
    stays: list[tuple[str, float, float, float | None]] = []
    present: dict[str, deque[int]] = {}  # by block, which of the stays have no end yet
    for each in streamed:
        if each.before is State.IN_FLIGHT:
            present.setdefault(each.block, deque()).append(len(stays))
            stays.append((each.block, each.begin - since, each.end - since, None))
        elif each.after is not State.IN_FLIGHT and present.get(each.block):
            place = present[each.block].popleft()
            stays[place] = (*stays[place][:3], each.end - since)
    lasted = [stay for stay in stays if stay[3] is None or stay[3] > 0]
    found: dict[str, list[tuple[float, float, float | None]]] = {}
    for block, asked, there, left in sorted(lasted[-_MOST_STAYS:], key=lambda stay: stay[1]):
        found.setdefault(block, []).append((asked, there, left))
    return found
