"""Which replica holds the beginning of a text, as far as a router can tell: where texts that began
so went before. No Ray and no tokens: beginnings are of characters.

A replica keeps what it computed of a text in pages of ``PAGE_TOKENS`` (kv/prefixes.py). A token has
a character at least, so texts that share a page share so many characters.
"""

import json
import math
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from itertools import count
from typing import Generic, TypeVar

import xxhash

from ..progressive.ladder import PAGE_TOKENS

Name = TypeVar("Name", bound=Hashable)
_CHUNK = PAGE_TOKENS
"""Characters from one beginning of a text to the next."""
_MOST = 2**16
"""Beginnings that are remembered: 4 million characters of texts, and some 10 MB."""
_SHARE = 0.5
"""Of a text that has to be known: a short greeting that all texts share is quickly computed."""
_SLACK = 4
"""Requests that the holder may have more than the least busy replica: beyond, waiting for it takes
longer than computing the beginning once more.
"""


def digest_beginnings(body: bytes) -> list[int]:
    """Return digests of the beginnings of a request's text, the shortest first; none for a body
    that has no text.
    """
    try:
        document = json.loads(body)
        parts = [document.get(name) for name in ("tools", "messages", "prompt")]
    except (ValueError, AttributeError, RecursionError):
        return []
    # JSON of a list, or of a text, goes on where more is added: a conversation, or a prompt.
    text = "".join(json.dumps(part) for part in parts if part is not None).encode()
    state = xxhash.xxh3_64()
    digests = []
    for start in range(0, len(text) - _CHUNK, _CHUNK):
        state.update(text[start : start + _CHUNK])
        digests.append(state.intdigest())
    return digests


class Beginnings(Generic[Name]):
    """Remembers where texts went; the ones that were used least recently are forgotten."""

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        self._holders: OrderedDict[int, Name] = OrderedDict()
        self._turns = count()
        self._last_turn: dict[Name, int] = {}

    def choose(self, digests: Sequence[int], loads: Mapping[Name, int]) -> Name:
        """Return the replica for a text: the one that holds most of it, or the least busy one.

        ``loads``: requests on their way of each replica there is, one at least.
        """
        chosen = self._holder(digests, loads)
        if chosen is None or loads[chosen] > min(loads.values()) + _SLACK:
            chosen = min(loads, key=lambda name: (loads[name], self._last_turn.get(name, -1)))
        self._last_turn[chosen] = next(self._turns)
        for digest in digests:
            self._holders[digest] = chosen
            self._holders.move_to_end(digest)
        while len(self._holders) > self._most:
            self._holders.popitem(last=False)
        return chosen

    def _holder(self, digests: Sequence[int], loads: Mapping[Name, int]) -> Name | None:
        """Return the replica that holds at least a share of a text; None: there is none."""
        fewest = max(1, math.ceil(_SHARE * len(digests)))
        for digest in reversed(digests[fewest - 1 :]):
            name = self._holders.get(digest)
            if name is not None and name in loads:
                return name
        return None
