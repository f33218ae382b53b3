"""Bars for slow work: placing weights and, on a terminal, passes that stream for long.

A forward knows its own bytes. Inside transformers' ``generate`` the bar is that of the whole
generation, whose arguments say how many passes it may take; where the text is streamed, that shows
progress from the first token on, and the bar is that of the prompt's pass.
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
        self._streams_text = False
        """Text comes with each of its forwards."""
        self._num_begun = 0
        """Forwards that it has begun."""

    @contextlib.contextmanager
    def generation(self, num_passes: int, *, streams_text: bool) -> Iterator[None]:
        """Show one bar for so many forwards, or for the first where the text is streamed; within
        another generation it is that one's.
        """
        outer = self._num_passes
        if not outer:
            self._num_passes, self._streams_text, self._num_begun = num_passes, streams_text, 0
        try:
            yield
        finally:
            self._num_passes = outer
            if not outer:
                self._streams_text = False
                self.close()

    def begin(self, num_bytes: int) -> None:
        """Start a forward that will stream so many bytes."""
        self._num_begun += 1
        if not (num_bytes and sys.stderr.isatty()) or (self._streams_text and self._num_begun > 1):
            return
        if not (self._num_passes and self._bar is not None):
            self.close()
            num_passes = 1 if self._streams_text else max(self._num_passes, 1)
            total = num_bytes * num_passes
            self._bar = progress_bar(total, "streaming weights", unit="B", delay=_DELAY_SECONDS)

    def update(self, num_bytes: int) -> None:
        """Say that more bytes have come."""
        if self._bar is not None:
            self._bar.update(num_bytes)

    def end(self) -> None:
        """End a forward; the bar of a generation stays."""
        if not self._num_passes or self._streams_text:
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
