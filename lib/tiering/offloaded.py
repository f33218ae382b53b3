"""While a block is away its parameters are zero-size ``OffloadedParameter``s.

A full-shape placeholder on the meta device would let CPU kernels compute with uninitialised memory
(torch 2.13 does so without an error). Code that uses such a parameter without calling its module (a
parent that takes ``child.weight``) gets the right answer, since the block is then fetched for that
one operation.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass

from ..errors import PlacementError

_SHAPE_QUESTIONS = {getattr(Tensor, name).__get__ for name in ("shape", "ndim", "nbytes")} | {
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_contiguous,
}  # fmt: skip
"""Answered from the kept shape."""
_METADATA = {
    getattr(Tensor, name).__get__
    for name in (
        "dtype",
        "device",
        "layout",
        "requires_grad",
        "grad",
        "is_leaf",
        "is_meta",
        "is_cuda",
        "is_cpu",
    )
} | {Tensor.is_floating_point, Tensor.is_complex, Tensor.element_size, Tensor.__hash__}
"""Answered by the placeholder itself."""
_SET_DATA: Any = getattr(Tensor, "data").__set__  # noqa: B009 (mypy sees the property's type)
_WRITING_OPERATORS = {"__setitem__"} | {
    f"__i{name}__"
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
}


class OffloadedParameter(nn.Parameter):
    """A parameter whose weights are away. It is a plain Parameter again for as long as they are
    back.
    """

    _tierhints_shape: Tensor
    """Meta tensor with the size, strides and dtype of the weights that are away."""
    _tierhints_fetch: Callable[[], contextlib.AbstractContextManager[None]]

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Answer questions about metadata at once; run anything else with the weights fetched for
        this one call.
        """
        kwargs = kwargs or {}
        if func in _SHAPE_QUESTIONS:
            return func(args[0]._tierhints_shape, *args[1:], **kwargs)
        if func in _METADATA:
            with DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func == _SET_DATA or _writes(func) and isinstance(args[0], OffloadedParameter):
            raise PlacementError(
                "this parameter's weights are offloaded: detach the runtime before changing the "
                "model"
            )
        with contextlib.ExitStack() as stack:
            for parameter in _find_offloaded((args, kwargs)):
                stack.enter_context(parameter._tierhints_fetch())
            return func(*args, **kwargs)


def _writes(func: Any) -> bool:
    """Say whether a function changes its first argument, by PyTorch's naming (``copy_``,
    ``__iadd__``).
    """
    name = getattr(func, "__name__", "")
    return name in _WRITING_OPERATORS or name.endswith("_") and not name.endswith("__")


def _find_offloaded(value: Any) -> Iterator[OffloadedParameter]:
    if isinstance(value, OffloadedParameter):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _find_offloaded(item)
    elif isinstance(value, dict):
        yield from _find_offloaded(tuple(value.values()))
