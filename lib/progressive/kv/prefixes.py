"""What earlier requests computed of the beginning of a text, for those that begin alike.

Only originals are kept: states as the full model has them, on disk, of which every tier is made
anew. Damage that a compact tier does to one answer never reaches another.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor

from ..ladder import PAGE_TOKENS, SINK_TOKENS, num_pages
from .originals import Originals, OriginalsFolder
from .pages import RequestStates

Pair = tuple[Tensor, Tensor]
"""Keys and values, (T, heads, dim) each."""
_MOST_FILES = 256
"""That beginnings have open: a process has 1024 where nobody gave it more."""


@dataclass(slots=True)
class _Entry:
    tokens: list[int]
    """Those of the first tokens and all pages."""
    originals: Originals
    sinks: list[Pair]
    """Of each layer, the states of a text's first tokens."""


@dataclass(frozen=True, slots=True)
class Found:
    """A beginning that is known: its first tokens, and so many pages."""

    entry: _Entry
    pages: int

    @property
    def tokens(self) -> int:
        """How long it is."""
        return SINK_TOKENS + self.pages * PAGE_TOKENS

    def base(self) -> tuple[Originals, int]:
        """Return the originals, which whoever gets them has to close, and how many pages a request
        that begins so has: the last stays in its tail.
        """
        return self.entry.originals.share(), num_pages(self.tokens)

    def read(self, layer: int, keys: Tensor, values: Tensor) -> Pair:
        """Read a layer's pages into ``keys`` and ``values`` (tokens of the pages, heads, dim), and
        return the states of the first tokens. Raises PlacementError as ``Originals.read`` does.
        """
        self.entry.originals.read(layer, self.pages, keys, values)
        return self.entry.sinks[layer]


class Prefixes:
    """Beginnings of texts, the least recently used dropped beyond ``most_bytes`` of disk, and
    beyond so many files.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        """By the digest of the whole beginning."""
        self._by_page: dict[int, int] = {}
        """Digest of a beginning of whole pages -> that of an entry that has it."""

    @property
    def num_bytes(self) -> int:
        """Bytes on disk; what several entries share counts for each."""
        return sum(entry.originals.num_bytes for entry in self._entries.values())

    def find(self, tokens: Sequence[int]) -> Found | None:
        """Return the longest beginning of a prompt that is known and leaves a token to compute."""
        pages = (len(tokens) - 1 - SINK_TOKENS) // PAGE_TOKENS
        for count, digest in reversed(list(enumerate(_digests(tokens, pages), start=1))):
            key = self._by_page.get(digest)
            entry = self._entries.get(key) if key is not None else None
            length = SINK_TOKENS + count * PAGE_TOKENS
            if entry is not None and entry.tokens[:length] == list(tokens[:length]):
                assert key is not None
                self._entries.move_to_end(key)
                return Found(entry, count)
        return None

    def keep(self, tokens: Sequence[int], originals: Originals, states: RequestStates) -> None:
        """Keep the pages of a text that ``originals`` has, which belong to this from now on."""
        pages = min(originals.pages, (len(tokens) - SINK_TOKENS) // PAGE_TOKENS)
        digests = _digests(tokens, pages)
        if not digests or digests[-1] in self._by_page or originals.num_bytes > self._most_bytes:
            originals.close()
            return
        sinks = []
        for layer in states.layers:
            keys, values = layer.read_full(0, SINK_TOKENS)
            sinks.append((keys.transpose(0, 1).clone(), values.transpose(0, 1).clone()))
        key = digests[-1]
        kept = list(tokens[: SINK_TOKENS + pages * PAGE_TOKENS])
        self._entries[key] = _Entry(kept, originals, sinks)
        for digest in digests:
            self._by_page.setdefault(digest, key)
        while self.num_bytes > self._most_bytes or len(self._entries) > _MOST_FILES:
            self._drop(next(iter(self._entries)))

    def forget(self, found: Found) -> None:
        """Drop a beginning that can't be read."""
        for key, entry in list(self._entries.items()):
            if entry is found.entry:
                self._drop(key)

    def close(self) -> None:
        """Drop all."""
        for key in list(self._entries):
            self._drop(key)

    def _drop(self, key: int) -> None:
        self._entries.pop(key).originals.close()
        self._by_page = {page: of for page, of in self._by_page.items() if of != key}


def _digests(tokens: Sequence[int], pages: int) -> list[int]:
    """Return a digest of each beginning of whole pages, the shortest first."""
    state = xxhash.xxh3_64()
    found, start = [], 0
    for page in range(1, pages + 1):
        end = SINK_TOKENS + page * PAGE_TOKENS
        state.update(b"".join(int(token).to_bytes(8, "little") for token in tokens[start:end]))
        found.append(state.intdigest())
        start = end
    return found


def adopt(states: RequestStates, found: Found, room: Sequence[Tensor]) -> None:
    """Give a request, which has no states yet, those of a known beginning.

    ``room``: buffers for the keys and values of its pages. Raises PlacementError where the
    originals can't be read; the states are then to be thrown away.
    """
    assert not states.length, "a request with states adopts no others"
    keys, values = (buffer[: found.pages * PAGE_TOKENS] for buffer in room)
    for layer in range(states.shape.layers):
        first = found.read(layer, keys, values)
        pairs = zip(first, (keys, values), strict=True)
        states.fill(layer, *(torch.cat(pair) for pair in pairs))


def write_originals(folder: OriginalsFolder, states: RequestStates) -> Originals:
    """Write the pages of a text that is held in full. Raises PlacementError where that fails."""
    pages = num_pages(states.length)
    originals = Originals(folder, states.shape, pages)
    try:
        for layer in range(states.shape.layers):
            both = states.read(layer)
            tokens = slice(SINK_TOKENS, SINK_TOKENS + pages * PAGE_TOKENS)
            originals.write(layer, 0, *(side[tokens] for side in both))
    except BaseException:
        originals.close()
        raise
    return originals
