"""Refusing to be traced: a graph would keep for good the weights that are there for one use.

torch.jit, torch.export, torch.compile and torch.fx each say in their own way that operations are
recorded and not computed. All is asked at each use of weights, so it takes about a microsecond.
"""

from typing import NoReturn

import torch
from torch._C import (
    _get_dispatch_mode,
    _get_tracing_state,
    _len_torch_dispatch_stack,
    _TorchDispatchModeKey,
)
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

from ...errors import PlacementError


def refuse_tracing() -> None:
    """Raise PlacementError where operations are recorded and not computed, and where torch.func
    would take what is made of weights for its own.
    """
    if torch.compiler.is_compiling():
        raise_compiling()
    if _get_tracing_state() is not None:
        raise_traced("torch.jit.trace")
    refuse_fx()
    if _len_torch_dispatch_stack() and _get_dispatch_mode(_TorchDispatchModeKey.FAKE) is not None:
        raise_traced("a FakeTensorMode")
    if levels := get_interpreter_stack():
        only_vmap = all(level.key() == TransformType.Vmap for level in levels)
        if torch.is_grad_enabled() or not only_vmap:
            raise PlacementError(
                "torch.func can't transform a model whose weights come and go, but for vmap under "
                "torch.no_grad(): detach the runtime first"
            )


def refuse_fx() -> None:
    """Raise PlacementError in torch.fx's tracer, and in make_fx, which uses it."""
    if is_fx_symbolic_tracing():
        raise_traced("torch.fx")


def raise_traced(tracer: str) -> NoReturn:
    """Say that a tracer can't have an attached model."""
    raise PlacementError(
        f"{tracer} can't trace a model whose weights come and go: detach the runtime first, and "
        "trace the model itself"
    )


def is_transformed() -> bool:
    """Say whether tensors may be torch.func's, or have forward-mode derivatives: kernels of our own
    know plain ones only.
    """
    return bool(get_interpreter_stack()) or forward_ad._current_level >= 0


class CompileRefused(PlacementError, AssertionError):
    """Goes through torch.compile as it is: other errors it wraps, or takes for a graph break."""


def raise_compiling() -> NoReturn:
    """Say that torch.compile and torch.export can't have an attached model."""
    raise CompileRefused(
        "torch.compile and torch.export can't trace a model whose weights come and go: detach the "
        "runtime first, or call the uncompiled model"
    )


# What torch.compiler.assume_constant_result does (it is run and not traced), which would import
# torch._dynamo here: 1.6 seconds.
raise_compiling._dynamo_marked_constant = True  # type: ignore[attr-defined]
