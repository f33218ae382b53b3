"""What was read ahead, until its layer's call shows whether that was right."""

from collections.abc import Collection, Sequence

from ...policy.experts.residents import Expert


class Guesses:
    """Experts that were read ahead, and those that were evicted for them."""

    def __init__(self) -> None:
        self._open: dict[int, dict[int, Sequence[Expert]]] = {}
        """By layer and number: what was evicted for it."""
        self._right: dict[Expert, None] = {}
        """Asked for by its layer's call, and not handed out yet."""
        self._gone: dict[Expert, None] = {}
        """Evicted for what nobody asked for, or would have taken no room."""

    def __bool__(self) -> bool:
        return any(self._open.values())

    def add(self, layer: int, number: int, evicted: Sequence[Expert]) -> None:
        """Note a read ahead, and what was evicted for it."""
        self._open.setdefault(layer, {})[number] = evicted

    def of(self, layer: int) -> tuple[int, ...]:
        """Return what is open of a layer, by number."""
        return tuple(self._open.get(layer, ()))

    def drop(self, layer: int, number: int) -> None:
        """Forget one that is not there any more."""
        self._open.get(layer, {}).pop(number, None)
        self._right.pop((layer, number), None)

    def settle(self, layer: int, used: Collection[int], *, bypasses: bool) -> None:
        """Hear what a layer's call uses. What a right guess took the room of would have left for a
        read on demand as well, unless that ``bypasses`` the cache.
        """
        for number, evicted in self._open.pop(layer, {}).items():
            if number in used:
                self._right[layer, number] = None
            if number not in used or bypasses:
                self._gone |= dict.fromkeys(evicted)

    def take_right(self, layer: int, number: int) -> bool:
        """Say once whether a use was foreseen."""
        return self._right.pop((layer, number), 0) is None

    def take_gone(self, layer: int, number: int) -> bool:
        """Say once whether what is missing was evicted for a wrong guess."""
        return self._gone.pop((layer, number), 0) is None

    def clear(self) -> None:
        """Forget all."""
        for kept in (self._open, self._right, self._gone):
            kept.clear()
