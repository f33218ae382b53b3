"""What is done around the calls of modules.

It begins before a user's own hooks and ends after them, however the call ends: a hook of PyTorch's
runs after an exception, but not after KeyboardInterrupt, and isn't told which one it was. And
encoders of PyTorch take another path where modules have hooks.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, Protocol

from torch import nn

from .tracing import refuse_tracing

Context = Callable[[tuple[Any, ...], dict[str, Any]], contextlib.AbstractContextManager[None]]
"""Makes the context of one call, from its arguments."""


class Around(Protocol):
    """What is done around each call of a module. ``call`` is a new object for each."""

    def passes(self) -> bool:
        """Say that this call needs nothing around it; refuses to be traced where it does."""

    def enter(self, call: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin; may refuse the call by raising."""

    def leave(self, call: object, failure: BaseException | None) -> None:
        """End, also where ``enter`` was interrupted half-way or refused."""


class Calls:
    """What is set around the calls of modules, until ``remove``. What comes later is outside what
    was there before.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def surround(self, module: nn.Module, around: Around) -> None:
        """Enter before each call of a module, its hooks included, and leave after it."""

        def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                if around.passes():  # before anything that a tracer doesn't know
                    return call(*args, **kwargs)
                this, failure = object(), None
                try:  # first: whatever interrupts what follows, it is left
                    around.enter(this, args, kwargs)
                    return call(*args, **kwargs)
                except BaseException as error:
                    failure = error
                    raise
                finally:
                    try:
                        around.leave(this, failure)
                    finally:
                        failure = None  # whose traceback has this frame, and views of slots

            return run

        self._wrap(module, wrap)

    def run_within(
        self, module: nn.Module, context: Context, *, method: str = "_call_impl"
    ) -> None:
        """Run each call of a module, its hooks included, or of one of its methods in a context."""

        def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(call)  # its signature, which callers ask for
            def run(*args: Any, **kwargs: Any) -> Any:
                refuse_tracing()
                with context(args, kwargs):
                    return call(*args, **kwargs)

            return run

        self._wrap(module, wrap, method)

    def remove(self) -> None:
        """Let the modules run as before."""
        while self._undo:
            self._undo.pop()()

    def _wrap(
        self,
        module: nn.Module,
        wrap: Callable[[Callable[..., Any]], Callable[..., Any]],
        method: str = "_call_impl",
    ) -> None:
        own = module.__dict__.get(method)

        def undo() -> None:
            module.__dict__.pop(method)
            if own is not None:
                module.__dict__[method] = own

        module.__dict__[method] = wrap(getattr(module, method))
        self._undo.append(undo)
