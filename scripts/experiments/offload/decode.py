"""Time every token of a greedy generation, with the bytes that moved for it.

A logits processor is called once per forward pass, by every system alike. At the pauses between
segments the caller may measure the link; the token after a pause is not timed, because a system
that prefetches had the pause to do it in.
"""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

SEGMENTS = 6
"""Of a generation, at most: a link wanders within seconds, and is measured between them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """From the end of one forward pass to the end of the next. ``disk_bytes`` is what the process
    had fetched from the disk, ``moved_bytes`` what a system itself says; the last timed interval of
    a segment has those of all its timed ones, since asking takes a system's time.
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
        synchronize: Callable[[], None] = lambda: None,
    ) -> None:
        """``logits_SV`` is written, a row per pass; after the ``pauses`` ``on_pause`` is called.

        ``synchronize`` waits for the logits on a device, before the clock is read.
        """
        self.logits_SV = logits_SV
        self.intervals: list[Interval] = []
        self._pauses = set(pauses)
        self._on_pause = on_pause
        self._moved_bytes = moved_bytes
        self._synchronize = synchronize
        self._time = 0.0
        self._segment = 0
        self._timed = False  # the prefill is told apart
        self._mark()

    def start(self) -> None:
        """Begin to measure: call it right before ``generate``."""
        self._synchronize()
        self._mark()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Note one pass; the scores (1, V) go on as they came."""
        self._synchronize()
        now = time.perf_counter()
        index = len(self.intervals)
        pauses = index in self._pauses
        counts = pauses or not self._timed or index == len(self.logits_SV) - 1
        self.intervals.append(
            Interval(
                seconds=now - self._time,
                disk_bytes=disk_bytes() - self._disk if counts else 0,
                moved_bytes=self._moved_bytes() - self._moved if counts else 0,
                segment=self._segment,
                timed=self._timed,
            )
        )
        self.logits_SV[index] = scores[0]
        self._timed = not pauses
        if pauses:
            self._segment += 1
            self._on_pause()
        if counts:
            self._mark()
        else:
            self._time = now  # what is fetched ahead meanwhile is on the clock
        return scores

    def _mark(self) -> None:
        self._disk = disk_bytes()
        self._moved = self._moved_bytes()
        self._time = time.perf_counter()


class TokenTimes:
    """Times the tokens of a system whose passes give several: a streamer for ``generate``."""

    def __init__(
        self,
        logits_SV: Tensor,
        *,
        moved_bytes: Callable[[], int] = lambda: 0,
    ) -> None:
        self.logits_SV = logits_SV
        self.intervals: list[Interval] = []
        self._moved_bytes = moved_bytes
        self._seen_prompt = False
        self._moved, self._disk, self._time = 0, 0, 0.0

    def start(self) -> None:
        """Begin to measure: call it right before ``generate``."""
        self._moved, self._disk = self._moved_bytes(), disk_bytes()
        self._time = time.perf_counter()

    def put(self, ids: Tensor) -> None:
        """Take the prompt, then one token at a time."""
        if not self._seen_prompt:
            self._seen_prompt = True
            return
        now = time.perf_counter()
        first = not self.intervals
        last = len(self.intervals) == len(self.logits_SV) - 1
        disk, moved = (disk_bytes(), self._moved_bytes()) if first or last else (0, 0)
        self.intervals.append(
            Interval(
                seconds=now - self._time,
                disk_bytes=disk - self._disk if first or last else 0,
                moved_bytes=moved - self._moved if first or last else 0,
                segment=min(len(self.intervals), 1),
                timed=not first,
            )
        )
        if first or last:
            self._disk, self._moved = disk, moved
        self._time = time.perf_counter() if first else now

    def end(self) -> None:
        """There is nothing to end."""


def plan_passes(num_timed: int) -> tuple[int, list[int]]:
    """Return the passes of a generation with that many timed tokens, and after which of them to
    pause: the prefill, and each segment but the last. Every segment begins with an untimed token.
    """
    num_segments = min(SEGMENTS, num_timed)
    bounds = [num_timed * segment // num_segments for segment in range(num_segments)]
    pauses = [bound + segment for segment, bound in enumerate(bounds)]
    return 1 + num_timed + num_segments, pauses


def disk_bytes() -> int:
    """Return the bytes that this process has had fetched from disks, mapped files included."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    raise OSError("/proc/self/io has no read_bytes line")
