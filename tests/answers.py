"""What an engine tells of one request."""

import threading
from queue import Queue

from lib.progressive.generation import Event, Outcome, Token


class Answer:
    """Collects the events of one request."""

    def __init__(self) -> None:
        self.tokens: list[Token] = []
        self.last: Queue[Outcome | Exception] = Queue()
        self.first = threading.Event()

    def __call__(self, event: Event) -> None:
        if isinstance(event, tuple):
            self.tokens += event
            self.first.set()
        else:
            self.last.put(event)

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    def outcome(self) -> Outcome:
        last = self.last.get(timeout=120)
        if isinstance(last, Exception):
            raise last
        return last
