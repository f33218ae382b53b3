"""Reading ahead: what will be read next is read by threads, while the caller computes.

The system's own read-ahead sees one file read in order, and a model takes tensors in another;
announcing those to it costs a call for every 128 KiB, and a copy out of the page cache. Here whole
pages go from the disk into a few buffers, used again and again: fresh memory would take longer to
come by than the disk to fill it.
"""

import mmap
import threading
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..files import page_memory
from ..units import SECTOR_BYTES
from .files import Extent

_NUM_BUFFERS = 8
_NUM_THREADS = 2
"""While one piece is on its way to memory the disk looks for the next."""


@dataclass(slots=True, eq=False)
class _Piece:
    """Bytes that are read at once; ``start``: their place among all that was expected."""

    name: str
    extent: Extent
    start: int
    buffer: mmap.mmap | None = None
    data: Tensor | None = None
    """What was read, in the buffer."""
    error: BaseException | None = None

    @property
    def end(self) -> int:
        return self.start + self.extent.num_bytes


class ReadAhead:
    """Reads tensors in the order in which they will be asked for: pairs of a name and the pieces in
    which its bytes are read, in order. Asked by one thread; to be closed.
    """

    def __init__(self, tensors: Iterable[tuple[str, Iterable[Extent]]]) -> None:
        self._starts: dict[str, int] = {}
        self._pieces: list[_Piece] = []
        end = 0
        for name, extents in tensors:
            self._starts[name] = end
            for extent in extents:
                self._pieces.append(_Piece(name, extent, end))
                end += extent.num_bytes
        self._changed = threading.Condition()
        self._asked = 0
        """The piece that was asked for last; the buffers of those before it serve others."""
        self._next = 0
        """The piece that the next free thread reads."""
        self._free: list[mmap.mmap] = []
        self._num_lent = 0
        self._closed = not self._pieces
        self._threads = [
            threading.Thread(target=self._read, name="tierhints-ahead", daemon=True)
            for _ in range(0 if self._closed else _NUM_THREADS)
        ]
        for thread in self._threads:
            thread.start()

    def borrow(self, name: str, offset: int, num_bytes: int) -> Tensor | None:
        """Return bytes of a tensor (1-D uint8) where they were read to, which is theirs until the
        next call; None where they weren't expected, were passed already, or lie in two pieces.
        Raises what reading them raised.
        """
        place = self._place(name, offset)
        if place is None or not num_bytes:
            return None
        piece = self._wait_for(place)
        assert piece.data is not None
        if place + num_bytes > piece.end:
            return None
        return piece.data[place - piece.start :][:num_bytes]

    def copy(self, name: str, offset: int, out: Tensor) -> bool:
        """Fill ``out`` (1-D uint8) with bytes of a tensor; returns False, and fills nothing, where
        they weren't expected or were passed already. Raises like ``borrow``.
        """
        place = self._place(name, offset)
        if place is None:
            return False
        filled = 0
        while filled < len(out):
            piece = self._wait_for(place + filled)
            assert piece.data is not None
            data = piece.data[place + filled - piece.start :][: len(out) - filled]
            out[filled : filled + len(data)] = data
            filled += len(data)
        return True

    def close(self) -> None:
        """Stop reading, and let go of what nobody has asked for."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._pieces.clear()
        self._free.clear()

    def _place(self, name: str, offset: int) -> int | None:
        """Return where bytes of a tensor are among those that are still to be had."""
        if self._closed or name not in self._starts:
            return None
        place = self._starts[name] + offset
        return place if place >= self._pieces[self._asked].start else None

    def _wait_for(self, place: int) -> _Piece:
        """Return the piece with a byte; those before it are passed."""
        with self._changed:
            while (piece := self._pieces[self._asked]).end <= place:
                self._give_back(piece)
                self._asked += 1
            self._next = max(self._next, self._asked)
            self._changed.notify_all()
            while piece.data is None and piece.error is None:
                self._changed.wait()
        if piece.error is not None:
            raise piece.error
        return piece

    def _give_back(self, piece: _Piece) -> None:
        """Let another piece have the buffer of one that was read."""
        if piece.buffer is not None and (piece.data is not None or piece.error is not None):
            self._free.append(piece.buffer)
            self._num_lent -= 1
            piece.buffer = piece.data = None

    def _read(self) -> None:
        while (piece := self._next_piece()) is not None:
            error = data = None
            try:
                num_bytes = piece.extent.num_bytes + 2 * SECTOR_BYTES
                if piece.buffer is None or len(piece.buffer) < num_bytes:
                    piece.buffer = page_memory(num_bytes)
                pages = piece.extent.read_pages(memoryview(piece.buffer), piece.name)
                data = torch.frombuffer(pages, dtype=torch.uint8)
            except BaseException as caught:  # raised where the piece is asked for
                error = caught
            with self._changed:
                piece.data, piece.error = data, error
                if self._pieces[self._asked].start > piece.start:
                    self._give_back(piece)  # passed in the meantime
                self._changed.notify_all()

    def _next_piece(self) -> _Piece | None:
        """Wait until a piece is to be read and there is a buffer for it; None: no more."""
        with self._changed:
            while not self._closed and self._next < len(self._pieces):
                if self._num_lent < _NUM_BUFFERS:
                    piece = self._pieces[self._next]
                    self._next += 1
                    self._num_lent += 1
                    piece.buffer = self._free.pop() if self._free else None
                    return piece
                self._changed.wait()
            return None
