"""The pair of hooks on one module."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ...errors import PlacementError
from ..residency.held import HeldGroup
from ..residency.stand_ins import NO_GRADIENTS, requires_grad

if TYPE_CHECKING:
    from .forwards import Forwards


class GroupHook:
    """Acquires the groups whose weights a module's forward uses, and releases them after it."""

    def __init__(self, forwards: "Forwards", groups: list[HeldGroup]) -> None:
        self._forwards = forwards
        self.groups = groups
        self.lookup = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(group.name for group in self.groups)})"

    def install(self, module: nn.Module, handles: list[RemovableHandle]) -> None:
        """Register the pair of hooks."""
        self.lookup = isinstance(module, nn.Embedding)
        # In front of a user's own hooks: they find the weights there, and one that raises leaves
        # our pair balanced.
        handles.append(
            module.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True)
        )
        handles.append(module.register_forward_hook(self._after, always_call=True))

    @contextlib.contextmanager
    def hold(self, module: nn.Module, args: Any, kwargs: Any) -> Iterator[None]:
        """Do as the pair of hooks does, for as long as the context lasts."""
        try:
            self._before(module, args, kwargs)
            yield
        finally:
            self._after(module, args, None)

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._forwards.acquire(self, module)
        # Also inputs that come from elsewhere: a user's hook, layers that are called one by one.
        if torch.is_grad_enabled() and (
            requires_grad((args, kwargs))
            or any(group.weights.requires_grad for group in self.groups)
        ):
            raise PlacementError(f"inputs or weights require gradients, {NO_GRADIENTS}")

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        self._forwards.release(self, module)
