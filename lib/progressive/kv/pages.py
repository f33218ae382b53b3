"""The keys and values of one request in fast memory.

Of each layer's tokens

    sinks (full) | pages (at the tier) | tail (full)

``settle`` makes pages of what has become whole ones (``ladder.num_pages``); the tail, in blocks of
``BLOCK_TOKENS`` that never move, is what may still be taken back or replaced. Sinks and blocks hold
a token's key and value side by side: (heads, tokens, key_dim + value_dim). A page is two tensors,
one of keys and one of values, rows by head and then by token.

    states = RequestStates(shape, tier)
    for layer ...: states.fill(layer, keys, values)    # a prompt's piece
    for layer ...: states.append(layer, keys, values)  # drafted tokens, ...
    states.crop(length)                                # ... and taken back
"""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ...errors import InputError
from ..ladder import BLOCK_TOKENS, PAGE_TOKENS, SINK_TOKENS, KvShape, KvTier, num_pages
from .formats import PageFormat, layer_formats, squared_error

Page = tuple[Tensor, Tensor]
"""Of keys, and of values, each in its format."""
OnPage = Callable[[int, int, Tensor, Tensor], None]
"""Is told a layer, a page's index, and the keys and values (PAGE_TOKENS, heads, dim) that the page
is made of.
"""


def _keep_nothing(layer: int, page: int, keys: Tensor, values: Tensor) -> None:
    """Leave the originals away."""


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

    def settle(self, length: int, on_page: Callable[[int, Tensor, Tensor], None]) -> None:
        """Make pages of what has become whole ones of the first ``length`` tokens, and free the
        room behind the last.
        """
        if len(self._blocks) > self._needed_blocks:
            del self._blocks[self._needed_blocks :]
            self._forget()
        first = len(self.pages)
        count = num_pages(length) - first
        if count > 0:
            keys, values = self.read_full(self.tail_start, self.tail_start + count * PAGE_TOKENS)
            on_page(first, keys.transpose(0, 1), values.transpose(0, 1))
            self._add_pages(keys, values)
            del self._blocks[: count * PAGE_TOKENS // BLOCK_TOKENS]
            self._forget()

    def fill(
        self, keys: Tensor, values: Tensor, on_page: Callable[[int, Tensor, Tensor], None]
    ) -> None:
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
        """Encode keys and values (heads, whole pages of tokens, dim), and note their errors."""
        sides = []
        for side, (of, given) in enumerate(zip(self.formats, states, strict=True)):
            heads, _, dim = given.shape
            paged = given.reshape(heads, -1, PAGE_TOKENS, dim)
            pages, error = of.encode(paged.transpose(0, 1))
            sides.append(pages)
            self.errors[side] += error
        self.pages += zip(*sides, strict=True)
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


class RequestStates:
    """Keys and values of one request, all layers, in fast memory.

    Tensors given and returned are on ``device`` and in ``dtype``; their memory isn't kept.
    """

    def __init__(
        self,
        shape: KvShape,
        tier: KvTier,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        assert shape.itemsize == dtype.itemsize, "the shape is of another dtype"
        self.shape = shape
        self.tier = tier
        self.dtype = dtype
        self.layers = [
            LayerStates(shape, layer_formats(shape, tier, layer, dtype), torch.device(device))
            for layer in range(shape.layers)
        ]

    @property
    def length(self) -> int:
        """Tokens that all layers have."""
        return min(layer.length for layer in self.layers)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors: after ``settle``, ``tier.num_bytes(shape, length)``."""
        return sum(layer.num_bytes for layer in self.layers)

    @property
    def errors(self) -> list[tuple[float, float]]:
        """Of each layer the sums of squared errors of its pages against the states that they were
        made of: keys', values'. Upper bounds once pages were demoted.
        """
        return [(layer.errors[0], layer.errors[1]) for layer in self.layers]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Add tokens (T, heads, dim) to a layer's tail."""
        self.layers[layer].append(keys, values)

    def fill(
        self, layer: int, keys: Tensor, values: Tensor, *, on_page: OnPage = _keep_nothing
    ) -> None:
        """Add tokens (T, heads, dim) to a layer, however many, and make pages on the way: a piece
        of a prompt is never in full here but for its tail. What is in pages can't be taken back.
        """
        self.layers[layer].fill(keys, values, functools.partial(on_page, layer))

    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens of all layers: their room is free once they settle.

        Raises InputError where pages go on.
        """
        first_open = max(layer.first_open for layer in self.layers)
        if length < first_open:
            told = f"tokens from {length} on can't be taken back"
            raise InputError(f"{told}: those before {first_open} are in pages")
        for layer in self.layers:
            layer.resize(min(layer.length, length))

    def settle(
        self,
        layer: int | None = None,
        *,
        length: int | None = None,
        on_page: OnPage = _keep_nothing,
    ) -> None:
        """Make pages of a layer's whole ones, or of all layers': they can't be taken back.

        ``length``: only the first tokens count; default: all. ``on_page`` may keep the originals.
        """
        if layer is None and length is not None and not self.layers[0].can_settle(length):
            return  # layers are alike between two steps
        for index in range(self.shape.layers) if layer is None else (layer,):
            states = self.layers[index]
            states.settle(
                states.length if length is None else length, functools.partial(on_page, index)
            )

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values, (length, heads, dim), as they are attended to."""
        keys, values = self.layers[layer].read()
        return keys.transpose(0, 1), values.transpose(0, 1)

    def rebuild(self, layer: int, tier: KvTier, keys: Tensor, values: Tensor) -> None:
        """Make a layer's pages anew at another tier, from the originals (T, heads, dim) of all of
        their tokens: those from ``SINK_TOKENS`` on. ``tier`` is the new one from the first on.
        """
        formats = layer_formats(self.shape, tier, layer, self.dtype)
        self.layers[layer].rebuild(formats, keys, values)
        self.tier = tier

    def demote(self, tier: KvTier) -> None:
        """Turn all pages into those of a lower tier, without originals: by dropping planes where
        its codes are a prefix, by encoding anew elsewhere.

        Raises InputError, before anything is changed, for a tier that is more precise somewhere.
        """
        formats = []
        for index, layer in enumerate(self.layers):
            keys, values = layer.formats
            wanted = layer_formats(self.shape, tier, index, self.dtype)
            formats.append((keys.lowered(wanted[0].precision), values.lowered(wanted[1].precision)))
        for layer, lowered in zip(self.layers, formats, strict=True):
            layer.demote(lowered)
        self.tier = tier
