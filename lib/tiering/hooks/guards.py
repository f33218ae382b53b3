"""What an attached model refuses outside its forwards.

A copy, a pickle, a conversion or a trace would keep stand-ins for weights, or compressed weights,
for good. PyTorch and Python ask a module for each of these by name: what they find is set on the
instances, and gone after detach.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NoReturn

from torch import nn

from ...errors import PlacementError
from .tracing import raise_traced, refuse_fx

SaveState = Callable[[nn.Module, Callable[..., None], dict[str, Any], str, bool], None]
"""Writes one module's part of a state_dict by its own method: destination, prefix, keep_vars."""


class Guards:
    """What is set on all modules of a model until ``remove``."""

    def __init__(
        self, model: nn.Module, save_state: SaveState, refuse_compiling: Callable[[], None]
    ) -> None:
        self._replaced: list[tuple[nn.Module, dict[str, Any]]] = []
        for module in model.modules():
            own = vars(module)
            guards = {
                **{name: guard(module) for name, guard in _GUARDS.items()},
                "_save_to_state_dict": partial(save_state, module, module._save_to_state_dict),
                "compile": partial(_compile, module, refuse_compiling),
                "_parameters": _Parameters(module._parameters),
            }
            self._replaced.append((module, {name: own.get(name, _NOTHING) for name in guards}))
            own.update(guards)

    def remove(self) -> None:
        """Leave the modules as they were."""
        for module, replaced in self._replaced:
            for name, value in replaced.items():
                if value is _NOTHING:
                    del vars(module)[name]
                else:
                    vars(module)[name] = value
        self._replaced.clear()


_NOTHING = object()


class _Parameters(dict[str, nn.Parameter | None]):
    """A module's parameters, of which none may be added or taken away.

    Exchanging one for the length of a call (torch.func.functional_call) is no change.
    """

    __slots__ = ()

    def __setitem__(self, name: str, value: nn.Parameter | None) -> None:
        if name not in self:
            _refuse_structure()
        super().__setitem__(name, value)

    def __delitem__(self, name: str) -> NoReturn:
        _refuse_structure()

    def pop(self, *args: Any) -> NoReturn:
        _refuse_structure()


class _Refusing:
    """Names of parameters that can't be read."""

    def __iter__(self) -> Iterator[str]:
        raise PlacementError(
            "DistributedDataParallel would write to weights that are placed by a runtime: detach "
            "it before wrapping the model"
        )


def _register_parameter(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
    if name not in module._parameters or module._parameters[name] is not param:
        _refuse_structure()


def _named_modules(
    own: Callable[..., Iterator[tuple[str, nn.Module]]], *args: Any, **kwargs: Any
) -> Iterator[tuple[str, nn.Module]]:
    """Refuse the tracer of torch.fx, which begins with this question."""
    refuse_fx()
    return own(*args, **kwargs)


def _refuse_structure() -> NoReturn:
    raise PlacementError(
        "the model's parameters are placed by a runtime: detach it before adding, replacing or "
        "removing any (pruning, weight norm and parametrizations do)"
    )


def _refuse_change(*args: Any, **kwargs: Any) -> NoReturn:
    raise PlacementError(
        "the model's weights are placed by a runtime: detach it before moving, converting or "
        "loading the model"
    )


def _refuse_copy(*args: Any) -> NoReturn:
    raise PlacementError(
        "a model whose weights are placed by a runtime can't be copied or pickled: detach the "
        "runtime first, or take the model's state_dict()"
    )


def _refuse_script() -> NoReturn:
    raise_traced("torch.jit.script")


def _compile(
    module: nn.Module, refuse_compiling: Callable[[], None], *args: Any, **kwargs: Any
) -> None:
    refuse_compiling()
    type(module).compile(module, *args, **kwargs)


_GUARDS: dict[str, Callable[[nn.Module], Any]] = {
    # to(), half(), cuda(), share_memory(): Module._apply would convert the resident half of the
    # model and then fail.
    "_apply": lambda module: _refuse_change,
    # Half of the weights would be loaded, and the rest refuse.
    "_load_from_state_dict": lambda module: _refuse_change,
    "register_parameter": lambda module: partial(_register_parameter, module),
    "_ddp_params_and_buffers_to_ignore": lambda module: _Refusing(),
    "__deepcopy__": lambda module: _refuse_copy,
    "__reduce_ex__": lambda module: _refuse_copy,
    "__prepare_scriptable__": lambda module: _refuse_script,
    "named_modules": lambda module: partial(_named_modules, module.named_modules),
}
