"""The context around the calls of one module that computes with weights."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...errors import PlacementError
from ..residency.held import HeldGroup
from ..residency.stand_ins import NO_GRADIENTS, requires_grad
from .tracing import refuse_tracing

if TYPE_CHECKING:
    from .forwards import Forwards


class GroupHook:
    """Acquires the groups whose weights a module's forward uses, and releases them after it."""

    def __init__(self, forwards: "Forwards", module: nn.Module, groups: list[HeldGroup]) -> None:
        self._forwards = forwards
        self.module = module
        self.groups = groups
        self.lookup = isinstance(module, nn.Embedding)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(group.name for group in self.groups)})"

    def passes(self) -> bool:
        """Say that a call is compiled where nothing moves."""
        if self._forwards.around.is_compiled():
            return True
        refuse_tracing()
        return False

    def enter(self, call: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Bring the weights into fast memory; begin a forward where none runs."""
        self._forwards.enter(call, self.module)
        self._forwards.acquire(call, self)
        # Also inputs that come from elsewhere: layers that are called one by one.
        if torch.is_grad_enabled() and (
            requires_grad((args, kwargs))
            or any(group.weights.requires_grad for group in self.groups)
        ):
            raise PlacementError(f"inputs or weights require gradients, {NO_GRADIENTS}")

    def leave(self, call: object, failure: BaseException | None) -> None:
        """End the use of the weights, and the forward where it began with the call."""
        self._forwards.release(call)
        self._forwards.leave(call, failure)

    @contextlib.contextmanager
    def hold(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """Enter, and leave when the context ends."""
        call, failure = object(), None
        try:
            self.enter(call, args, kwargs)
            yield
        except BaseException as error:
            failure = error
            raise
        finally:
            try:
                self.leave(call, failure)
            finally:
                failure = None  # whose traceback has this frame
