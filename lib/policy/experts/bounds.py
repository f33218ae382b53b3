"""What no policy can do better than: reads, bytes, seconds. Never one for another.

Each bound knows the future. Experts that are used and not kept pass through buffers that don't
count, so each holds for policies that bypass and for those that don't. First uses are misses.
"""

import heapq
import math
from collections.abc import Mapping, Sequence

from .routing import Call
from .values import distinct


def belady_misses(calls: Sequence[Call], slots: int) -> int:
    """Return the fewest misses of decode steps with room for ``slots`` experts of one size.

    Exact: after each call, what is used again last goes first, the call's own experts included
    (Belady, IBM Systems J. 5(2), 1966, with bypass). Reading ahead moves reads in time and saves
    none, so this bounds bytes too where all experts have the same.
    """
    uses = _uses(calls)
    following = _following(uses)
    held: dict[tuple[int, int], float] = {}
    heap: list[tuple[float, tuple[int, int]]] = []
    misses = 0
    for moment, (call, experts) in enumerate(zip(calls, uses, strict=True)):
        misses += call.decode * sum(expert not in held for expert in experts)
        for place, expert in enumerate(experts):
            held[expert] = following[moment][place]
            heapq.heappush(heap, (-held[expert], expert))
        while len(held) > slots:
            negative, expert = heapq.heappop(heap)
            if held.get(expert) == -negative:
                del held[expert]
    return misses


def pfoo_missed_bytes(
    calls: Sequence[Call], sizes: Mapping[int, Sequence[int]], capacity_bytes: int
) -> int:
    """Return bytes that decode steps read at least, whatever the sizes of experts: PFOO-L.

    To hit, an expert must stay from one use to the next and fill its bytes for so many calls. All
    stays together can't fill more than the capacity times all calls, though at one moment they may
    here: the shortest are taken until that is used up, the last in part (Berger, Beckmann and
    Harchol-Balter, PFOO's lower bound on misses, arXiv 1711.03709, section 5).
    """
    uses = _uses(calls)
    following = _following(uses)
    total = 0
    stays = []
    for moment, experts in enumerate(uses):
        for place, (layer, index) in enumerate(experts):
            total += sizes[layer][index] * calls[moment].decode
            until = following[moment][place]
            if until < math.inf and calls[int(until)].decode:
                stays.append((int(until) - moment, sizes[layer][index]))
    room = capacity_bytes * (len(calls) - 1)
    saved = 0
    for duration, size in sorted(stays):
        taken = min(size, room // duration)
        saved += taken
        room -= taken * duration
        if taken < size:
            saved += 1  # a part of a byte
            break
    return max(0, total - saved)


def least_seconds(compute_seconds: float, missed_bytes: int, *, bytes_per_second: float) -> float:
    """Return the time that computing and reading so many bytes take at least, each at once.

    It bounds time, not bytes: with ``missed_bytes`` of a bound above, no order of reads and no
    look-ahead over one link is faster.
    """
    return max(compute_seconds, missed_bytes / bytes_per_second)


def _uses(calls: Sequence[Call]) -> list[list[tuple[int, int]]]:
    return [[(call.layer, index) for index in distinct(call.tokens)] for call in calls]


def _following(uses: Sequence[Sequence[tuple[int, int]]]) -> list[list[float]]:
    """Return for each use when the next of the same expert is; infinity for the last."""
    ahead: dict[tuple[int, int], int] = {}
    following: list[list[float]] = [[] for _ in uses]
    for moment in range(len(uses) - 1, -1, -1):
        following[moment] = [ahead.get(expert, math.inf) for expert in uses[moment]]
        ahead.update((expert, moment) for expert in uses[moment])
    return following
