"""Building a model without memory for its weights."""

import contextlib
import weakref
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def empty_weights() -> Iterator[None]:
    """Put the parameters of modules that are built inside on the meta device; buffers stay real.

    Many buffers are computed in constructors (rotary frequencies) and stand in no checkpoint, so
    ``torch.device("meta")`` would lose them. ``attach(model, weights=...)`` gives the weights, and
    the persistent buffers their values.
    """
    register = nn.Module.register_parameter
    made: dict[int, tuple[weakref.ref[nn.Parameter], nn.Parameter]] = {}

    def register_empty(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        if param is not None and param.device.type != "meta":
            before = made.get(id(param))
            if before is None or before[0]() is not param:
                empty = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
                empty._is_hf_initialized = True  # type: ignore[attr-defined]  # for transformers
                before = made[id(param)] = weakref.ref(param), empty
            module._parameters[name] = before[1]  # a tied weight stays one parameter

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
