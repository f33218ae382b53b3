"""Writing behind: payloads go to a store in a thread while their next parts are made."""

import contextlib
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy
import torch
from torch import Tensor

from .base import Store

_POLL_SECONDS = 0.1


class _Abandoned(Exception):
    """The rest of a payload won't come."""


_Part = tuple[int, Tensor] | _Abandoned | None
"""Bytes and their place in the payload; None: that was all."""


class WriteBehind:
    """Puts payloads into one store, one after the other; a part waits while one is written."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tierhints-write")
        self._written: list[Future[None]] = []

    @contextlib.contextmanager
    def put(self, key: str, num_bytes: int) -> Iterator[Callable[[int, Tensor], None]]:
        """Write a payload; yields what takes its parts (uint8, in order, each with its place),
        which must not change any more. An error within leaves no payload.
        """
        parts: queue.Queue[_Part] = queue.Queue(1)
        written = self._thread.submit(self._store.put, key, num_bytes, _fill(parts, num_bytes))
        self._written.append(written)

        def hand_over(part: _Part) -> None:
            while not written.done():  # else it has failed: see ``finish``
                with contextlib.suppress(queue.Full):
                    parts.put(part, timeout=_POLL_SECONDS)
                    return

        try:
            yield lambda offset, data: hand_over((offset, data))
        except BaseException:
            hand_over(_Abandoned())
            self._written.remove(written)  # the caller has the reason
            raise
        hand_over(None)

    @property
    def failed(self) -> bool:
        """Something could not be written."""
        return any(each.done() and each.exception() is not None for each in self._written)

    def finish(self) -> BaseException | None:
        """Wait until all is written; returns the first error."""
        errors = [each.exception() for each in self._written]
        self._written.clear()
        return next((error for error in errors if error is not None), None)

    def close(self) -> None:
        """End the thread, once all is written."""
        self._thread.shutdown()


def _fill(parts: "queue.Queue[_Part]", num_bytes: int) -> Iterator[Tensor]:
    """Yield the bytes of a payload in order, zeros between its parts."""
    end = 0
    while (part := parts.get()) is not None:
        if isinstance(part, _Abandoned):
            raise part
        offset, data = part
        yield _zeros(offset - end)
        yield data
        end = offset + len(data)
    yield _zeros(num_bytes - end)


def _zeros(num_bytes: int) -> Tensor:
    """Return zeros without torch, which makes OpenMP's threads for this thread where they are many.
    With more of those than cores OpenMP's threads sleep between computations from then on, of all
    threads, and what is computed in many short pieces takes three times as long.
    """
    return torch.from_numpy(numpy.zeros(num_bytes, numpy.uint8))
