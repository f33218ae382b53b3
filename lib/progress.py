"""Progress of long work on stderr: a bar on a terminal, elsewhere a line every tenth with the time
to go.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from .units import format_seconds

T = TypeVar("T")
_QUIET_SECONDS = 5.0
"""What is over sooner prints no lines."""
_STEPS = 10


class Progress(Protocol):
    """What counts work that is done; a context manager that ends the bar."""

    def update(self, n: float = 1, /) -> object:
        """Say that so much more is done."""

    def close(self) -> None:
        """Take the bar away."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> object: ...


def progress_bar(total: int, name: str, *, unit: str = "", delay: float = 0.0) -> Progress:
    """Return a bar of ``total`` steps; ``unit`` "B" counts bytes. A bar on a terminal appears after
    ``delay`` seconds, and is gone when it ends.
    """
    if not sys.stderr.isatty():
        return _Lines(total, name)
    from tqdm import tqdm

    scale: dict[str, Any] = {"unit_scale": True, "unit_divisor": 1024} if unit == "B" else {}
    bar: Progress = tqdm(
        total=total, desc=name, unit=unit or "it", delay=delay, leave=False, **scale
    )
    return bar


def show_progress(items: Iterable[T], name: str, *, total: int, unit: str = "") -> Iterator[T]:
    """Go through items with a bar."""
    with progress_bar(total, name, unit=unit) as bar:
        for item in items:
            yield item
            bar.update(1)


class _Lines:
    """A line each time that another tenth is done."""

    def __init__(self, total: int, name: str) -> None:
        self._total = total
        self._name = name
        self._done = 0.0
        self._tenths = 0
        self._begin = time.monotonic()

    def update(self, n: float = 1, /) -> None:
        self._done += n
        tenths = int(_STEPS * self._done / self._total) if self._total else 0
        if tenths <= self._tenths:
            return
        self._tenths = tenths
        elapsed = time.monotonic() - self._begin
        if elapsed < _QUIET_SECONDS:
            return
        left = elapsed * (self._total - self._done) / self._done
        ending = f"{format_seconds(left)} to go" if left > 0 else f"in {format_seconds(elapsed)}"
        share = min(self._done / self._total, 1)
        print(f"{self._name}: {share:.0%}, {ending}", file=sys.stderr, flush=True)

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()
