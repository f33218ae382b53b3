"""While weights are away, or held in another form, their parameters are zero-size
``OffloadedParameter``s.

A full-shape placeholder on the meta device would let CPU kernels compute with uninitialised memory
(torch 2.13 does so without an error). Code that uses such a parameter without calling its module (a
parent that takes ``child.weight``) gets the right answer, since the block is then fetched for that
one operation. Where the weights have ``WeightOps`` (compressed, or moving in shards of rows),
matrix products and lookups are theirs, and nothing else ever sees the whole weight unless it must.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass
from torch.nn import functional as F

from ...errors import PlacementError
from ..hooks.tracing import is_transformed, refuse_tracing
from .casting import cast_input

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
        "grad_fn",
        "is_leaf",
        "is_meta",
        "is_cuda",
        "is_cpu",
    )
} | {
    Tensor.is_floating_point, Tensor.is_complex, Tensor.element_size, Tensor.__hash__,
    Tensor.requires_grad_, Tensor.requires_grad.__set__,  # type: ignore[attr-defined]
}  # fmt: skip
"""Answered by the placeholder itself."""
_GET_DATA: Any = getattr(Tensor, "data").__get__  # noqa: B009
_DETACHING = (_GET_DATA, Tensor.detach, torch.detach)
_SET_DATA: Any = getattr(Tensor, "data").__set__  # noqa: B009 (mypy sees the property's type)
_WRITING_OPERATORS = {"__setitem__"} | {
    f"__i{name}__"
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
}


NO_GRADIENTS = (
    "but offloaded weights serve inference only: use torch.no_grad(), or detach the runtime"
)


_WRITTEN = "this parameter's weights are offloaded: detach the runtime before changing the model"


class WeightOps(Protocol):
    """What can be computed with weights that are not there as a tensor: W is (rows, columns)."""

    looks_up: bool
    """It has ``rows``; where it doesn't, the weight is expanded for a lookup."""

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x @ W.T + bias: (..., columns) -> (..., rows), in x's dtype."""

    def rows(self, ids: Tensor) -> Tensor:
        """Return W[ids]: (...) -> (..., columns)."""

    def expand(self, start: int, end: int) -> Tensor:
        """Return W[start:end] in the model's dtype."""


class Away(Protocol):
    """What stands behind a parameter whose weights are away."""

    shape: Tensor
    """Meta tensor with the size, strides and dtype of the weights."""
    ops: WeightOps | None
    """What can be computed without the weights as a tensor."""
    transposed: bool
    """The parameter is W.T, as in GPT-2's Conv1D."""

    def prepare(self, whole: "Sequence[Away]", by_rows: "Sequence[Away]") -> bool:
        """Make room for all that an operation needs at the same time, before any of it is fetched.

        Returns whether parameters have come or gone for it: the operation begins anew then.
        """

    def fetch(self) -> contextlib.AbstractContextManager[None]:
        """Make the parameter a plain one for as long as the context lasts."""

    def copy(self) -> Tensor | None:
        """Read the weights, to be kept, into memory of their own; None where fetching does that."""


class OffloadedParameter(nn.Parameter):
    """A parameter whose weights are away. It is a plain Parameter again for as long as they are
    back.
    """

    _tierhints_away: Away

    def __getattr__(self, name: str) -> Any:
        """Refuse to be one that ``set_away`` didn't make: other code has made it of this class."""
        if name.startswith("_tierhints_"):
            raise PlacementError(
                "a parameter was made of one whose weights are offloaded (by another offloader?): "
                "detach the runtime first"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __deepcopy__(self, memo: dict[int, Any]) -> "OffloadedParameter":
        """Refuse: the copy would have no weights."""
        raise PlacementError("a model whose weights are offloaded can't be copied: detach it first")

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse: the pickle would have no weights."""
        raise PlacementError(
            "a model whose weights are offloaded can't be pickled: detach it first, or save its "
            "state_dict()"
        )

    def set_(self, *args: Any, **kwargs: Any) -> Tensor:
        """Refuse: PyTorch asks no ``__torch_function__`` of this one."""
        raise PlacementError(_WRITTEN)

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
            return func(args[0]._tierhints_away.shape, *args[1:], **kwargs)
        if func in _METADATA:
            with DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func == _SET_DATA or _writes(func, args, kwargs):
            raise PlacementError(_WRITTEN)
        refuse_tracing()
        if func in _DETACHING:
            if (copied := args[0]._tierhints_away.copy()) is not None:
                return copied
            func = Tensor.detach  # as .data, but for sharing the counter that shows later writes
        with contextlib.ExitStack() as stack:
            if torch.is_grad_enabled():
                if requires_grad((args, kwargs)):
                    raise PlacementError(f"inputs require gradients, {NO_GRADIENTS}")
                stack.enter_context(torch.no_grad())
            # The kernels know plain tensors only.
            own = None if is_transformed() else _own_operation(func, args, kwargs)
            # Of one whose own operation it is the rows, or a shard at a time, are enough.
            needed = [
                parameter
                for parameter in _find_offloaded((args, kwargs))
                if own is None or parameter is not own[0]
            ]
            whole = [parameter._tierhints_away for parameter in needed]
            by_rows = [own[0]._tierhints_away] if own is not None and func is F.linear else []
            for away in (*whole, *by_rows):
                if away.prepare(whole, by_rows):
                    return func(*args, **kwargs)  # what is away has changed: look again
            for parameter in needed:
                if isinstance(parameter, OffloadedParameter):  # its group may be there by now
                    stack.enter_context(parameter._tierhints_away.fetch())
            return func(*args, **kwargs) if own is None else own[1]()


def set_away(parameter: nn.Parameter, away: Away, *, placeholder: Tensor) -> None:
    """Take a parameter's weights from it; ``away`` computes or fetches what is asked of it."""
    set_weights(parameter, placeholder)
    parameter.__class__ = OffloadedParameter
    assert isinstance(parameter, OffloadedParameter)
    parameter._tierhints_away = away


def set_weights(parameter: nn.Parameter, weights: Tensor) -> None:
    """Make a parameter a plain one with these weights."""
    if isinstance(parameter, OffloadedParameter):
        parameter.__class__ = nn.Parameter  # type: ignore[assignment]
        del parameter._tierhints_away
    parameter.data = weights


def swap_contents(parameter: nn.Parameter, other: nn.Parameter) -> None:
    """Exchange two plain parameters' tensors, also of different devices; references to one of
    the Python objects see the other's tensor. Unlike torch.utils.swap_tensors for objects that
    have weak references, too (nn.LSTM keeps some).
    """
    assert type(parameter) is type(other) is nn.Parameter
    torch._C._swap_tensor_impl(parameter, other)


def _own_operation(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[OffloadedParameter, Callable[[], Tensor]] | None:
    """Return the parameter whose ops can compute a call, and the call; None where none can."""
    if func is F.linear:
        named = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
        weight, x, bias = named["weight"], named["input"], named.get("bias")
        if (ops := _ops(weight)) and not weight._tierhints_away.transposed and _is_plain(x):
            return weight, lambda: multiply(ops, x, bias)
    elif func is torch.addmm and not kwargs and len(args) == 3:
        bias, x, weight = args
        if (ops := _ops(weight)) and weight._tierhints_away.transposed and _is_plain(x):
            return weight, lambda: multiply(ops, x, bias)
    elif func is F.embedding:
        named = dict(zip(("input", "weight", "padding_idx", "max_norm"), args, strict=False))
        named |= kwargs
        weight, ids = named["weight"], named["input"]
        ops = _ops(weight)
        if (
            ops
            and ops.looks_up
            and not (weight._tierhints_away.transposed or named.get("max_norm"))
        ):
            return weight, lambda: ops.rows(ids)
    elif func is Tensor.__getitem__ and (index := _as_index(args[1])) is not None:
        weight = args[0]
        if (ops := _ops(weight)) and weight.dim() == 3 and 0 <= index < weight.shape[0]:
            rows, columns = weight.shape[1:]
            return weight, lambda: ops.expand(index * rows, (index + 1) * rows).view(rows, columns)
    return None


def multiply(ops: WeightOps, x: Tensor, bias: Tensor | None) -> Tensor:
    """Compute a product in the dtype in which torch would, under autocast too."""
    if torch._C._is_any_autocast_enabled():
        x, bias = cast_input(x), None if bias is None else cast_input(bias)
    return ops.linear(x, bias)


def _ops(weight: Any) -> WeightOps | None:
    return weight._tierhints_away.ops if isinstance(weight, OffloadedParameter) else None


def _as_index(index: Any) -> int | None:
    """Return the number behind an index of one expert, which may be a tensor of one element."""
    if isinstance(index, Tensor) and index.dim() == 0 and index.dtype == torch.int64:
        return int(index)
    return index if type(index) is int else None


def _is_plain(x: Any) -> bool:
    return not isinstance(x, OffloadedParameter)


def requires_grad(value: Any) -> bool:
    """Say whether some tensor in nested containers requires gradients; parameters whose weights are
    away don't count.
    """
    if isinstance(value, Tensor):
        return _is_plain(value) and value.requires_grad
    if isinstance(value, list | tuple):
        return any(requires_grad(item) for item in value)
    return isinstance(value, dict) and any(requires_grad(item) for item in value.values())


def _writes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Say whether a function changes a parameter that is away: its first argument, one tensor or
    a list, by PyTorch's naming (``copy_``, ``__iadd__``, ``_foreach_mul_``), or ``out``.
    """
    name = getattr(func, "__name__", "")
    changed: list[Any] = [kwargs.get("out")]
    if name in _WRITING_OPERATORS or name.endswith("_") and not name.endswith("__"):
        changed += args[:1] or kwargs.values()
    return any(True for _ in _find_offloaded(changed))


def _find_offloaded(value: Any) -> Iterator[OffloadedParameter]:
    if isinstance(value, OffloadedParameter):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _find_offloaded(item)
    elif isinstance(value, dict):
        yield from _find_offloaded(tuple(value.values()))


@contextlib.contextmanager
def plain_tensors() -> Iterator[None]:
    """Make ordinary tensors, whatever the caller's modes: those made in inference mode could not be
    used outside it, and a default device (``torch.device("meta")``) is for the caller's tensors.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.no_grad())
        if torch._C._len_torch_function_stack():
            stack.enter_context(torch.device("cpu"))
        yield
