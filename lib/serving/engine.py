"""What the endpoint needs of that which generates: ``progressive.engine.Engine`` has it."""

from collections.abc import Callable
from typing import Any, Protocol

from ..progressive.generation import Event, GenerationRequest


class TextEngine(Protocol):
    """Answers many requests at a time; its methods may be called from any thread."""

    @property
    def context(self) -> int:
        """The most tokens of a prompt and its answer."""

    def check(self, request: GenerationRequest) -> None:
        """Raise RequestError for what can't be served, whatever else runs."""

    def submit(self, request: GenerationRequest, on_event: Callable[[Event], None]) -> int:
        """Queue a request, and return its number; raises RequestError, of the code ``queue_full``
        where too many wait and ``closed`` where none is taken any more.

        ``on_event`` is called from the engine's thread, the last time with an Outcome or an
        exception.
        """

    def cancel(self, number: int) -> None:
        """End a request, which still gets its Outcome. Nothing happens where it has ended."""

    def stop(self, number: int) -> None:
        """End a request whose answer is whole, as at a stop token."""

    @property
    def is_alive(self) -> bool:
        """Whether it takes requests."""

    def stats(self) -> Any:
        """Return what it does and did: a dataclass of numbers, and of dictionaries tier -> number.
        ``waiting``, ``running``, ``kv_bytes`` and ``kv_budget`` are of now, others count up.
        """
