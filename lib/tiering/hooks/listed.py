"""The contexts around experts that are modules of a list, and around the layers that call them."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ..residency.listed import ListedExpert, ListedExperts
from .group_hook import GroupHook


class LayerHook:
    """Tells a list of experts when its layer is called, and with how many tokens."""

    def __init__(self, listed: ListedExperts) -> None:
        self._listed = listed

    def passes(self) -> bool:
        """Never: what a layer is called with counts."""
        return False

    def enter(self, call: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin the layer's call."""
        self._listed.begin_call(count_tokens(args, kwargs))

    def leave(self, call: object, failure: BaseException | None) -> None:
        """End it."""
        self._listed.end_call()


class ExpertHook(GroupHook):
    """Acquires an expert for its tokens. One that is below and is called without any computes with
    the shapes of its weights.
    """

    def enter(self, call: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Bring the weights into fast memory, if there is anything to compute with them."""
        (expert,) = self.groups
        assert isinstance(expert, ListedExpert)
        expert.rows = count_tokens(args, kwargs)
        if expert.rows or not expert.units:
            super().enter(call, args, kwargs)
        else:
            expert.show_blank()

    def leave(self, call: object, failure: BaseException | None) -> None:
        """End the use of the weights."""
        (expert,) = self.groups
        assert isinstance(expert, ListedExpert)
        expert.hide_blank()
        super().leave(call, failure)


def count_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return the tokens of a call by its first tensor (..., width); 1 where there is none."""
    tensors: Iterator[Tensor] = (each for each in (*args, *kwargs.values()) if _is_tensor(each))
    first = next(tensors, None)
    if first is None:
        return 1
    return first.numel() // first.shape[-1] if first.numel() else 0


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0
