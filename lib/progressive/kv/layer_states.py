"""One layer's keys and values of one request in fast memory: see ``pages.py``."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..ladder import BLOCK_TOKENS, PAGE_TOKENS, SINK_TOKENS, KvShape, num_pages
from .formats import PageFormat, encode_pages, squared_error

Page = tuple[Tensor, Tensor]
"""Of keys, and of values, each in its format."""
EncodedPages = tuple[list[Tensor], float]
"""Of one side, and the sum of their squared errors."""
OnLayerPage = Callable[[int, Tensor, Tensor], None]
"""Is told the first page's index, and the keys and values (tokens, heads, dim) that pages are made
of.
"""
_TOGETHER = 8
"""Layers whose pages are made at once: as many numbers as a step of a prompt has in one."""


class LayerStates:
    """One layer's states."""

    def __init__(
        self, shape: KvShape, formats: tuple[PageFormat, PageFormat], device: torch.device
    ) -> None:
        self.pages: list[Page] = []
        self.length = 0
        """Tokens."""
        self.errors = [0.0, 0.0]
        """Sums of squared errors of the pages' keys, and of their values."""
        self._key_dim = shape.key_dim
        self._block_shape = shape.heads, BLOCK_TOKENS, shape.key_dim + shape.value_dim
        self._sinks = torch.empty(
            shape.heads, SINK_TOKENS, self._block_shape[2], dtype=formats[0].dtype, device=device
        )
        self._blocks: list[Tensor] = []
        self._table: Tensor | None = None
        self._num_bytes = 0
        self._use(formats)

    @property
    def table(self) -> Tensor:
        """Where all lies, as the kernel takes it (codecs/native/pages.cpp), int64."""
        if self._table is None:
            keys, values = self.formats
            heads, _, width = self._block_shape
            size = self._sinks.element_size()
            numbers = [heads, self._key_dim, width - self._key_dim, size * 8]
            numbers += [*keys.bits, *values.bits, len(self.pages)]
            full = [
                (len(piece[0]), piece.data_ptr(), piece.data_ptr() + self._key_dim * size)
                for piece in (self._sinks, *self._blocks)
            ]
            pages = [(PAGE_TOKENS, keys.address(k), values.address(v)) for k, v in self.pages]
            for piece in (full[0], *pages, *full[1:]):
                numbers += piece
            self._table = torch.tensor(numbers)
        return self._table

    @property
    def tail_start(self) -> int:
        """The first token behind the pages."""
        return SINK_TOKENS + PAGE_TOKENS * len(self.pages)

    @property
    def first_open(self) -> int:
        """The first token that may still change: sinks may, as long as there are no pages."""
        return self.tail_start if self.pages else 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        if self._num_bytes == 0:
            paged = sum(keys.nbytes + values.nbytes for keys, values in self.pages)
            full = self._sinks.nbytes + sum(block.nbytes for block in self._blocks)
            self._num_bytes = full + paged
        return self._num_bytes

    def resize(self, length: int) -> None:
        """Make room for so many tokens, or take back those behind them: ``settle`` frees room."""
        self.length = length
        missing = self._needed_blocks - len(self._blocks)
        if missing > 0:
            self._blocks += [self._sinks.new_empty(self._block_shape) for _ in range(missing)]
            self._forget()

    def extend(self) -> Tensor:
        """Make room for one more token, whose states are to be written; return ``table``."""
        self.length += 1
        if self.length > self._room:
            self.resize(self.length)
        return self.table if self._table is None else self._table

    def write(self, start: int, keys: Tensor, values: Tensor) -> None:
        """Put the states of tokens from ``start`` on where they are full."""
        for piece, first, last, at in self._pieces(start, start + len(keys)):
            taken = slice(at - start, at - start + last - first)
            piece[:, first:last, : self._key_dim] = keys[taken].transpose(0, 1)
            piece[:, first:last, self._key_dim :] = values[taken].transpose(0, 1)

    def read(self) -> tuple[Tensor, Tensor]:
        """Return all keys and values, (heads, length, dim), as they are attended to."""
        sinks = self.read_full(0, min(SINK_TOKENS, self.length))
        parts = [sinks]
        for page in self.pages:
            keys, values = (of.decode(side) for of, side in zip(self.formats, page, strict=True))
            parts.append((keys, values))
        parts.append(self.read_full(self.tail_start, self.length))
        keys, values = (torch.cat(side, dim=1) for side in zip(*parts, strict=True))
        return keys, values

    def can_settle(self, length: int) -> bool:
        """Whether ``settle`` has anything to do."""
        return num_pages(length) > len(self.pages) or len(self._blocks) > self._needed_blocks

    @property
    def _needed_blocks(self) -> int:
        return -(-max(0, self.length - self.tail_start) // BLOCK_TOKENS)

    def settle(self, length: int, on_page: OnLayerPage) -> None:
        """Make pages of what has become whole ones of the first ``length`` tokens, and free the
        room behind the last.
        """
        settle_layers([self], length, [on_page])

    def free_room(self) -> None:
        """Free the room behind the last token."""
        if len(self._blocks) > self._needed_blocks:
            del self._blocks[self._needed_blocks :]
            self._forget()

    def fill(self, keys: Tensor, values: Tensor, on_page: OnLayerPage) -> None:
        """Add tokens (T, heads, dim), and make pages without a way through the tail."""
        if len(keys) < SINK_TOKENS + 2 * PAGE_TOKENS:  # what is in the tail might be enough
            self.append(keys, values)
            self.settle(self.length, on_page)
            return
        first = len(self.pages)
        count = num_pages(self.length + len(keys)) - first
        sinks = max(0, SINK_TOKENS - self.length)
        self.append(keys[:sinks], values[:sinks])
        tail = self.read_full(self.tail_start, self.length)
        taken = sinks + count * PAGE_TOKENS - tail[0].shape[1]
        both = [
            torch.cat([old, new[sinks:taken].transpose(0, 1)], dim=1)
            for old, new in zip(tail, (keys, values), strict=True)
        ]
        self._blocks, self.length = [], self.tail_start + count * PAGE_TOKENS
        on_page(first, *(side.transpose(0, 1) for side in both))
        self._add_pages(*both)
        self.append(keys[taken:], values[taken:])

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add tokens (T, heads, dim) to the tail."""
        start = self.length
        self.resize(start + len(keys))
        self.write(start, keys, values)

    def rebuild(self, formats: tuple[PageFormat, PageFormat], keys: Tensor, values: Tensor) -> None:
        """Make all pages anew from the originals of their tokens (T, heads, dim)."""
        count = len(self.pages)
        assert len(keys) == len(values) == PAGE_TOKENS * count, "originals of all pages are needed"
        self.pages, self.errors = [], [0.0, 0.0]
        self._use(formats)
        if count:
            self._add_pages(keys.transpose(0, 1), values.transpose(0, 1))

    def demote(self, formats: tuple[PageFormat, PageFormat]) -> None:
        """Turn all pages into these formats, which ``PageFormat.lowered`` has made.

        Errors become upper bounds: the root of their sum grows by that of what is lost here.
        """
        for side, (old, new) in enumerate(zip(self.formats, formats, strict=True)):
            if old == new:
                continue
            lost = 0.0
            for index, page in enumerate(self.pages):
                lowered = old.lower(page[side], new)
                lost += squared_error(old.decode(page[side]), new.decode(lowered))
                self.pages[index] = (lowered, page[1]) if side == 0 else (page[0], lowered)
            self.errors[side] = (self.errors[side] ** 0.5 + lost**0.5) ** 2
        self._use(formats)

    def _use(self, formats: tuple[PageFormat, PageFormat]) -> None:
        self.formats = formats
        self.fits_kernel = self._sinks.is_cpu and all(of.fits_kernel for of in formats)
        """Whether the kernel attends to these states."""
        self._forget()

    def _forget(self) -> None:
        """Pieces have come or gone: describe them anew when asked."""
        self._table, self._num_bytes = None, 0
        self._room = self.tail_start + BLOCK_TOKENS * len(self._blocks)

    def _add_pages(self, *states: Tensor) -> None:
        """Encode keys and values (heads, whole pages of tokens, dim)."""
        self.put_pages(*encode_pages(self.formats, states))

    def put_pages(self, keys: EncodedPages, values: EncodedPages) -> None:
        """Take pages behind those that are there, with their squared errors."""
        self.pages += zip(keys[0], values[0], strict=True)
        for side, (_, error) in enumerate((keys, values)):
            self.errors[side] += error
        self._forget()

    def drop_tail(self, pages: int) -> None:
        """Give the tail's room for the tokens of so many pages back."""
        del self._blocks[: pages * PAGE_TOKENS // BLOCK_TOKENS]
        self._forget()

    def read_full(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Return keys and values (heads, T, dim) of tokens that are full: copies."""
        pieces = [piece[:, first:last] for piece, first, last, _ in self._pieces(start, end)]
        both = torch.cat(pieces, dim=1) if pieces else self._sinks[:, :0]
        return both[..., : self._key_dim], both[..., self._key_dim :]

    def _pieces(self, start: int, end: int) -> Iterator[tuple[Tensor, int, int, int]]:
        """Yield where full tokens from ``start`` to ``end`` lie: tensor, first and last row, and
        the first row's token.
        """
        while start < min(end, SINK_TOKENS):
            last = min(end, SINK_TOKENS)
            yield self._sinks, start, last, start
            start = last
        while start < end:
            index, row = divmod(start - self.tail_start, BLOCK_TOKENS)
            count = min(end - start, BLOCK_TOKENS - row)
            yield self._blocks[index], row, row + count, start
            start += count


def settle_layers(
    layers: Sequence[LayerStates], length: int, on_pages: Sequence[OnLayerPage]
) -> None:
    """Do what ``LayerStates.settle`` does in layers of one request that have as many tokens, some
    of them together.
    """
    for one in layers:
        one.free_room()
    first, start = len(layers[0].pages), layers[0].tail_start
    count = num_pages(length) - first
    if count <= 0:
        return
    for begin in range(0, len(layers), _TOGETHER):
        some = layers[begin : begin + _TOGETHER]
        full = [one.read_full(start, start + count * PAGE_TOKENS) for one in some]
        for (keys, values), on_page in zip(full, on_pages[begin:], strict=False):
            on_page(first, keys.transpose(0, 1), values.transpose(0, 1))
        sides = [
            encode_pages([one.formats[side] for one in some], [pair[side] for pair in full])
            for side in (0, 1)
        ]
        for one, of_keys, of_values in zip(some, *sides, strict=True):
            one.put_pages(of_keys, of_values)
            one.drop_tail(count)
