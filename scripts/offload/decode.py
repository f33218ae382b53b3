"""Time every token of a greedy generation, with the bytes that moved for it.

A logits processor is called once per forward pass, by every system alike. At the pauses between
segments the caller may measure the link; the token after a pause is not timed, because whoever
prefetches had the pause to do it in.
"""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """From the end of one forward pass to the end of the next. ``disk_bytes`` is what the process
    had fetched from the disk, ``moved_bytes`` what a system itself says.
    """

    seconds: float
    disk_bytes: int
    moved_bytes: int
    segment: int
    timed: bool


class Recorder:
    """Keeps each pass's logits and interval; pass 0 is the prefill. Give it to ``generate`` as a
    logits processor, after ``start``.
    """

    def __init__(
        self,
        logits_SV: Tensor,
        *,
        pauses: Collection[int],
        on_pause: Callable[[], None],
        moved_bytes: Callable[[], int] = lambda: 0,
    ) -> None:
        """``logits_SV`` is written, a row per pass; after the ``pauses`` ``on_pause`` is called."""
        self.logits_SV = logits_SV
        self.intervals: list[Interval] = []
        self._pauses = set(pauses)
        self._on_pause = on_pause
        self._moved_bytes = moved_bytes
        self._segment = 0
        self._timed = False  # the prefill is told apart
        self._mark()

    def start(self) -> None:
        """Begin to measure: call it right before ``generate``."""
        self._mark()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Note one pass; the scores (1, V) go on as they came."""
        now = time.perf_counter()
        index = len(self.intervals)
        self.intervals.append(
            Interval(
                seconds=now - self._time,
                disk_bytes=disk_bytes() - self._disk,
                moved_bytes=self._moved_bytes() - self._moved,
                segment=self._segment,
                timed=self._timed,
            )
        )
        self.logits_SV[index] = scores[0]
        self._timed = index not in self._pauses
        if not self._timed:
            self._segment += 1
            self._on_pause()
        self._mark()
        return scores

    def _mark(self) -> None:
        self._disk = disk_bytes()
        self._moved = self._moved_bytes()
        self._time = time.perf_counter()


def plan_passes(num_timed: int) -> tuple[int, list[int]]:
    """Return the passes of a generation with that many timed tokens in two segments, and after
    which of them to pause: the prefill, and the middle.
    """
    middle = 1 + num_timed // 2
    return num_timed + 3, [0, middle]


def disk_bytes() -> int:
    """Return the bytes that this process has had fetched from disks, mapped files included."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    raise OSError("/proc/self/io has no read_bytes line")
