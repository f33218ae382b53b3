"""Writing behind: payloads go to a store in a thread while the next ones are made."""

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy
import torch
from torch import Tensor

from ...units import MIB
from .base import Store

_WAITING_BYTES = 8 * MIB
"""Parts that are in memory until they are written, at most; a larger one waits alone."""
_PAUSE_SECONDS = 0.5
"""For the first token, before anything is written for the next load."""
Add = Callable[[int, Tensor, bool], None]
"""Takes a part of a payload: its place, its bytes (uint8, which mustn't change any more; the parts
come in order), and whether they stay in memory anyway.
"""


class _Abandoned(Exception):
    """The rest of a payload won't come."""


@dataclass(slots=True, eq=False)
class _Payload:
    """A payload on its way."""

    parts: deque[tuple[int, Tensor, int]] = field(default_factory=deque)
    """Place in it, bytes, and how many of these are in memory until they are written."""
    complete: bool = False
    """All parts have been handed over."""
    abandoned: bool = False
    written: bool = False
    """It is in the store, or can't be put there: further parts go nowhere."""


class WriteBehind:
    """Puts payloads into one store, one after the other."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tierhints-write")
        self._written: list[Future[None]] = []
        self._changed = threading.Condition()
        self._waiting_bytes = 0
        """In memory until they are written."""
        self._not_before = 0.0
        """When what takes no memory may be written, by the clock."""

    @contextlib.contextmanager
    def later(self) -> Iterator[None]:
        """Leave the disk to others, and for a moment thereafter the processor: meanwhile write what
        takes memory, and no more.
        """
        self._not_before = math.inf
        try:
            yield
        finally:
            self._start(time.monotonic() + _PAUSE_SECONDS)

    @contextlib.contextmanager
    def put(self, key: str, num_bytes: int) -> Iterator[Add]:
        """Write a payload; yields what takes its parts. An error within leaves no payload."""
        payload = _Payload()
        written = self._thread.submit(self._write, key, num_bytes, payload)
        self._written.append(written)

        def add(offset: int, data: Tensor, stays: bool) -> None:
            taken_bytes = 0 if stays else len(data)
            with self._changed:
                while self._waiting_bytes and self._waiting_bytes + taken_bytes > _WAITING_BYTES:
                    self._changed.wait()
                if not payload.written:
                    payload.parts.append((offset, data, taken_bytes))
                    self._waiting_bytes += taken_bytes
                    self._changed.notify_all()

        try:
            yield add
        except BaseException:
            self._written.remove(written)  # the caller has the reason
            payload.abandoned = True
            raise
        finally:
            with self._changed:
                payload.complete = True
                self._changed.notify_all()

    @property
    def failed(self) -> bool:
        """Something could not be written."""
        return any(each.done() and each.exception() is not None for each in self._written)

    def finish(self) -> BaseException | None:
        """Wait until all is written, now and not later; returns the first error."""
        self._start(0)
        errors = [each.exception() for each in self._written]
        self._written.clear()
        return next((error for error in errors if error is not None), None)

    def close(self) -> None:
        """End the thread, once all is written."""
        self._thread.shutdown()

    def _start(self, at: float) -> None:
        with self._changed:
            self._not_before = at
            self._changed.notify_all()

    def _write(self, key: str, num_bytes: int, payload: _Payload) -> None:
        try:
            self._store.put(key, num_bytes, self._bytes(payload, num_bytes))
        finally:
            with self._changed:
                payload.written = True
                while payload.parts:
                    self._drop_first(payload)

    def _bytes(self, payload: _Payload, num_bytes: int) -> Iterator[Tensor]:
        """Yield a payload in order as its parts come, zeros between them."""
        end = 0
        while (part := self._first(payload)) is not None:
            offset, data = part
            yield _zeros(offset - end)
            yield data
            end = offset + len(data)
            with self._changed:
                self._drop_first(payload)
        yield _zeros(num_bytes - end)

    def _first(self, payload: _Payload) -> tuple[int, Tensor] | None:
        """Wait for a part, and until it may be written; None: there are no more."""
        with self._changed:
            while not (payload.parts or payload.complete):
                self._changed.wait()
            while not self._waiting_bytes and (pause := self._not_before - time.monotonic()) > 0:
                self._changed.wait(min(pause, threading.TIMEOUT_MAX))
            if payload.abandoned:
                raise _Abandoned
            return payload.parts[0][:2] if payload.parts else None

    def _drop_first(self, payload: _Payload) -> None:
        self._waiting_bytes -= payload.parts.popleft()[2]
        self._changed.notify_all()


def _zeros(num_bytes: int) -> Tensor:
    """Return zeros without torch, which makes OpenMP's threads for this thread where they are many.
    With more of those than cores OpenMP's threads sleep between computations from then on, of all
    threads, and what is computed in many short pieces takes three times as long.
    """
    return torch.from_numpy(numpy.zeros(num_bytes, numpy.uint8))
