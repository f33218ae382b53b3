"""Long measurements hand each step's result to whoever keeps it, and get kept ones back."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Remember(Protocol):
    """Returns the result of a step: a kept one of that name, else what computing it gives.

    Results are lists, strings and numbers, and names are unique within a measurement.
    """

    def __call__(self, name: str, compute: Callable[[], T], /) -> Any:
        """Return the step's result."""


def call(name: str, compute: Callable[[], T], /) -> T:
    """Compute the step: nothing is kept."""
    return compute()
