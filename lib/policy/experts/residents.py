"""Which experts are in fast memory, in bytes, and which of them goes first.

Every resident has a key that stays as it is between its uses, and every layer a shift that grows
with its calls: what goes first has the smallest *value*, its key less its layer's shift, and was
used longest ago among equals. A layer's heap holds its residents by key, one heap more holds the
layers by their smallest value. Entries that no longer hold are dropped when they surface: an
access costs O(log n) amortised, and nothing is ever looked for among all residents.
"""

import heapq
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

Expert = tuple[int, int]
"""A layer and an expert of it, both from 0."""

Key = Callable[[Expert], float]


class Admission(NamedTuple):
    """The answer to one call: experts of its layer by index, in the order asked for.

    ``misses`` must be read; those of ``passing`` too, but are not held: they go through slots that
    are not the cache's. What is ``evicted`` leaves first, in this order.
    """

    hits: tuple[int, ...]
    misses: tuple[int, ...]
    evicted: tuple[Expert, ...]
    passing: tuple[int, ...] = ()


Rank = tuple[float, int]
"""How long to keep a resident: by value, then by the moment of its last use."""

_SPARE = 32
"""Entries that a heap may have above twice its residents before it is made anew."""


class Residents:
    """A set of experts within ``capacity_bytes``; ``sizes`` holds bytes, by layer and expert."""

    def __init__(self, sizes: Mapping[int, Sequence[int]], capacity_bytes: int) -> None:
        self.sizes = sizes
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self._listed: dict[Expert, Rank] = {}  # by key: the value less its layer's shift
        self._held: dict[Expert, None] = {}
        self._layers: dict[int, list[tuple[float, int, int]]] = {layer: [] for layer in sizes}
        self._shifts: dict[int, float] = dict.fromkeys(sizes, 0.0)
        self._first: list[tuple[float, int, int, int]] = []  # value, moment, layer, version
        self._versions: dict[int, int] = dict.fromkeys(sizes, 0)
        self._changed: dict[int, None] = {}
        self._moment = 0

    def __contains__(self, expert: Expert) -> bool:
        return expert in self._held

    def __len__(self) -> int:
        return len(self._held)

    def experts(self) -> tuple[Expert, ...]:
        """Return what is held, in the order it came."""
        return tuple(self._held)

    @property
    def free_bytes(self) -> int:
        """Bytes left; below 0 after a shrink, until enough has been dropped."""
        return self.capacity_bytes - self.used_bytes

    def size(self, expert: Expert) -> int:
        """Return the bytes of an expert."""
        return self.sizes[expert[0]][expert[1]]

    def admit(self, layer: int, experts: Sequence[int], key: Key) -> Admission:
        """Hold all of these experts, which one step uses at once; none goes for another."""
        hits, misses = self._split(layer, experts)
        for index in hits:
            self._unlist((layer, index))
        evicted = self.make_room(sum(self.size((layer, index)) for index in misses))
        for index in misses:
            self._add((layer, index))
        for index in experts:
            self._list((layer, index), key((layer, index)))
        return Admission(hits=hits, misses=misses, evicted=evicted)

    def offer(self, layer: int, experts: Sequence[int], key: Key) -> Admission:
        """Hold of these experts what finds room, or ranks above what it takes the room of.

        None goes for another that is held already.
        """
        hits, misses = self._split(layer, experts)
        for index in hits:
            self._unlist((layer, index))
        gone: dict[Expert, None] = {}
        for index in misses:
            evicted = self.offer_one((layer, index), key((layer, index)))
            gone |= dict.fromkeys(evicted or ())
        for index in hits:
            self._list((layer, index), key((layer, index)))
        held, passing = self._split(layer, misses)
        came = {(layer, index) for index in misses}
        return Admission(
            hits=hits,
            misses=held,
            evicted=tuple(expert for expert in gone if expert not in came),
            passing=passing,
        )

    def offer_one(
        self, expert: Expert, key: float, keep: Collection[Expert] = ()
    ) -> tuple[Expert, ...] | None:
        """Hold an expert if there is room, or what goes for it ranks lower and is none of ``keep``.

        Returns what went; None, and nothing went, where it can't be.
        """
        self._moment += 1
        rank = (key - self._shifts[expert[0]], self._moment)
        going: list[tuple[Expert, Rank]] = []
        kept: list[tuple[Expert, Rank]] = []
        free = self.free_bytes
        while free < self.size(expert):
            first = self.first()
            if first is None or first[1] >= rank:
                for other, listed in (*going, *kept):
                    self._put(other, listed)
                return None
            other = first[0]
            (kept if other in keep else going).append((other, self._listed[other]))
            self._unlist(other)
            free += 0 if other in keep else self.size(other)
        for other, listed in kept:
            self._put(other, listed)
        for other, _ in going:
            self.drop(other)
        self._add(expert)
        self._list(expert, key)
        return tuple(other for other, _ in going)

    def make_room(self, needed: int) -> tuple[Expert, ...]:
        """Let go of what ranks lowest until so many bytes are free; returns what went."""
        evicted = []
        while self.free_bytes < needed:
            first = self.first()
            assert first is not None
            self.drop(first[0])
            evicted.append(first[0])
        return tuple(evicted)

    def drop(self, expert: Expert) -> None:
        """Let go of an expert."""
        del self._held[expert]
        self.used_bytes -= self.size(expert)
        self._unlist(expert)

    def change_key(self, expert: Expert, key: float) -> None:
        """Give a held expert another key; when it was used last stays."""
        self._put(expert, (key, self._listed[expert][1]))

    def shift(self, layer: int, shift: float) -> None:
        """Set what is taken from the keys of a layer."""
        if shift != self._shifts[layer]:
            self._shifts[layer] = shift
            self._changed[layer] = None

    def first(self) -> tuple[Expert, Rank] | None:
        """Return what would go first, and its rank; None where nothing may go."""
        for layer in self._changed:
            self._renew(layer)
        self._changed.clear()
        while self._first:
            value, moment, layer, version = self._first[0]
            if version == self._versions[layer]:
                return (layer, self._layers[layer][0][2]), (value, moment)
            heapq.heappop(self._first)
        return None

    def _split(self, layer: int, experts: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return those held and those not."""
        held = self._held
        return (
            tuple(index for index in experts if (layer, index) in held),
            tuple(index for index in experts if (layer, index) not in held),
        )

    def _add(self, expert: Expert) -> None:
        self._held[expert] = None
        self.used_bytes += self.size(expert)

    def _list(self, expert: Expert, key: float) -> None:
        """Let a held expert go in its turn; it was used now."""
        self._moment += 1
        self._put(expert, (key, self._moment))

    def _unlist(self, expert: Expert) -> None:
        """Keep an expert from going until it is listed again."""
        if self._listed.pop(expert, None) is not None:
            self._changed[expert[0]] = None

    def _put(self, expert: Expert, rank: Rank) -> None:
        layer, index = expert
        self._listed[expert] = rank
        heap = self._layers[layer]
        heapq.heappush(heap, (*rank, index))
        if len(heap) > 2 * len(self.sizes[layer]) + _SPARE:
            self._layers[layer] = [
                (*current, index)
                for index in range(len(self.sizes[layer]))
                if (current := self._listed.get((layer, index))) is not None
            ]
            heapq.heapify(self._layers[layer])
        self._changed[layer] = None

    def _renew(self, layer: int) -> None:
        """Find a layer's smallest key again."""
        heap = self._layers[layer]
        while heap and self._listed.get((layer, heap[0][2])) != (heap[0][0], heap[0][1]):
            heapq.heappop(heap)
        self._versions[layer] += 1
        if heap:
            key, moment, _ = heap[0]
            entry = (key - self._shifts[layer], moment, layer, self._versions[layer])
            heapq.heappush(self._first, entry)
            if len(self._first) > 2 * len(self.sizes) + _SPARE:
                current = self._versions
                self._first = [entry for entry in self._first if entry[3] == current[entry[2]]]
                heapq.heapify(self._first)
