"""Bars for slow work, on a terminal only: placing weights, and passes that stream for long.

A forward knows its own bytes. Inside transformers' ``generate`` the bar is that of the whole
generation: how many passes it may still take stands in the loop that calls the model.
"""

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, cast

from tqdm import tqdm

_DELAY_SECONDS = 2.0
"""What is over sooner shows no bar."""


@contextlib.contextmanager
def placing_bar(num_bytes: int) -> Iterator[Callable[[int], None]]:
    """Show the bytes placed so far and the time to go; yields what is told of more bytes."""
    with _bar("placing weights", num_bytes, delay=0.0) as bar:
        yield lambda more: bar.update(more) and None


class PassBar:
    """The bar of the present forward, or of the generation that it is a part of."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._generation: weakref.ref[Any] | None = None

    def begin(self, num_bytes: int) -> None:
        """Start a forward that will stream so many bytes."""
        if not (num_bytes and sys.stderr.isatty()):
            return
        criteria, num_passes = _running_generation()
        if criteria is not None and self._generation is not None:
            if self._generation() is criteria:
                return
        self.close()
        self._bar = _bar("streaming weights", num_bytes * num_passes, delay=_DELAY_SECONDS)
        if criteria is not None:
            # It goes when generate() returns, or raises.
            self._generation = weakref.ref(criteria, lambda _: self.close())

    def update(self, num_bytes: int) -> None:
        """Say that more bytes have come."""
        if self._bar is not None:
            self._bar.update(num_bytes)

    def end(self) -> None:
        """End a forward; the bar of a generation stays."""
        if self._generation is None:
            self.close()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
        self._bar = self._generation = None


def _bar(what: str, num_bytes: int, *, delay: float) -> Any:
    return tqdm(
        total=num_bytes,
        desc=what,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        delay=delay,
        leave=False,
        disable=not sys.stderr.isatty(),
    )


def _running_generation() -> tuple[Any, int]:
    """Return the stopping criteria of the generation that this thread is in, if any, and how many
    passes it may still take; else None and the one pass.
    """
    frame = cast(FrameType | None, sys._getframe(1))
    while frame is not None:
        if {"stopping_criteria", "input_ids"} <= set(frame.f_code.co_varnames):
            local = frame.f_locals
            criteria, ids = local.get("stopping_criteria"), local.get("input_ids")
            longest = getattr(criteria, "max_length", None)
            if longest is not None and ids is not None:
                return criteria, max(int(longest) - ids.shape[-1], 1)
        frame = frame.f_back
    return None, 1
