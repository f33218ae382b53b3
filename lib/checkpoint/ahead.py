"""Reading ahead: the system is told what will be read next, and reads it while others compute.

Its own read-ahead sees one file read in order, and a model takes tensors in another. No thread and
no buffer: what was announced waits in the page cache, for as long as it takes to get there.
"""

from collections.abc import Iterable

from ..units import KIB, MIB
from .files import Extent

AHEAD_BYTES = 32 * MIB
"""Announced beyond what is being read: enough to keep a fast disk busy."""
_STEP_BYTES = 128 * KIB
"""Announced at a time: of more, Linux takes no more than a device's read-ahead, here the least."""


class ReadAhead:
    """Announces tensors in the order in which they will be read: (name, where its bytes lie)."""

    def __init__(self, tensors: Iterable[tuple[str, Iterable[Extent]]]) -> None:
        self._starts: dict[str, int] = {}
        self._extents: list[tuple[int, Extent]] = []
        """With the bytes that come before each."""
        end = 0
        for name, extents in tensors:
            self._starts[name] = end
            for extent in extents:
                self._extents.append((end, extent))
                end += extent.num_bytes
        self._announced = 0
        self._next = 0

    def reached(self, name: str, offset: int) -> None:
        """Hear that a tensor is being read from this byte on; announce what comes after it."""
        if name not in self._starts:
            return
        here = self._starts[name] + offset
        self._announced = max(self._announced, here)
        while self._next < len(self._extents) and self._announced < here + AHEAD_BYTES:
            start, extent = self._extents[self._next]
            done = self._announced - start
            if done >= extent.num_bytes:
                self._next += 1
                continue
            size = min(_STEP_BYTES, extent.num_bytes - done)
            extent.part(done, size).announce()
            self._announced += size
