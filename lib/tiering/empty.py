"""Building a model without memory for its weights."""

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def empty_weights() -> Iterator[None]:
    """Put the parameters of modules that are built inside on the meta device; buffers stay real.

    Buffers are computed in constructors (rotary frequencies) and stand in no checkpoint, so
    ``torch.device("meta")`` would lose them. ``attach(model, weights=...)`` gives the weights.
    """
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        if param is not None and param.device.type != "meta":
            given = module._parameters[name]
            assert given is not None
            module._parameters[name] = nn.Parameter(
                given.to("meta"), requires_grad=given.requires_grad
            )

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
