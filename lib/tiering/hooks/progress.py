"""Bars for slow work: placing weights and, on a terminal, passes that stream for long.

A forward knows its own bytes. Inside transformers' ``generate`` the bar is that of the whole
generation, whose arguments say how many passes it may take.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from ...progress import progress_bar

_DELAY_SECONDS = 2.0
"""What is over sooner shows no bar."""
_LENGTHS = ("max_new_tokens", "max_length")


@contextlib.contextmanager
def placing_bar(num_bytes: int) -> Iterator[Callable[[int], object]]:
    """Show the bytes placed so far and the time to go; yields what is told of more bytes."""
    with progress_bar(num_bytes, "placing weights", unit="B") as bar:
        yield bar.update


class PassBar:
    """The bar of the present forward, or of the generation that it is a part of."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._num_passes = 0
        """Of the generation that runs; 0: none does."""

    @contextlib.contextmanager
    def generation(self, num_passes: int) -> Iterator[None]:
        """Show one bar for so many forwards; within another generation it is that one's."""
        outer, self._num_passes = self._num_passes, self._num_passes or num_passes
        try:
            yield
        finally:
            self._num_passes = outer
            if not outer:
                self.close()

    def begin(self, num_bytes: int) -> None:
        """Start a forward that will stream so many bytes."""
        if not (num_bytes and sys.stderr.isatty()):
            return
        if not (self._num_passes and self._bar is not None):
            self.close()
            total = num_bytes * max(self._num_passes, 1)
            self._bar = progress_bar(total, "streaming weights", unit="B", delay=_DELAY_SECONDS)

    def update(self, num_bytes: int) -> None:
        """Say that more bytes have come."""
        if self._bar is not None:
            self._bar.update(num_bytes)

    def end(self) -> None:
        """End a forward; the bar of a generation stays."""
        if not self._num_passes:
            self.close()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None


def count_passes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return how many forwards transformers' ``generate`` may make of these arguments, at most."""
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    named = {name: kwargs.get(name, getattr(config, name, None)) for name in _LENGTHS}
    if isinstance(named["max_new_tokens"], int):
        return max(named["max_new_tokens"], 1)
    ids = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
    given = ids.shape[-1] if isinstance(ids, Tensor) and ids.dim() == 2 else 0
    longest = named["max_length"]
    return max(longest - given, 1) if isinstance(longest, int) else 1
