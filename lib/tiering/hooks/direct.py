"""Forwards that go straight to the kernels of compressed weights in fast memory.

A class's own forward comes to the same kernels through ``OffloadedParameter``, which asks of every
operation what it wants; of a Linear, a Conv1D or an Embedding the module says it. What is out of
the ordinary (tracers, torch.func, weights exchanged for a call) goes the other way still.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _get_tracing_state, _len_torch_dispatch_stack

from ...codecs.kernels import CompressedWeight
from ...codecs.storage import is_transposed
from ...errors import PlacementError
from ..residency.held import HeldGroup
from ..residency.stand_ins import NO_GRADIENTS, OffloadedParameter, multiply
from .tracing import is_transformed

Forward = Callable[[Any], Tensor]

_CONV1D = "transformers.pytorch_utils"


class DirectForwards:
    """The forwards that are set on modules' instances, until ``remove``. A user's own are left."""

    def __init__(self) -> None:
        self._set: dict[nn.Module, Forward] = {}

    def follow(self, model: nn.Module, groups: Iterable[HeldGroup]) -> None:
        """Give each module whose weight resides compressed a forward, and no other module."""
        held = {
            id(group.weights.parameter(part)): (group.weights.compressed, part.parameter)
            for group in groups
            for part in group.payload.parts
            if part.parameter in group.weights.compressed
        }
        for module in model.modules():
            place = held.get(id(module._parameters.get("weight")))
            if place is None:
                self._unset(module)
            elif "forward" not in vars(module) and (forward := _choose(module, *place)):
                self._set[module] = vars(module)["forward"] = forward

    def remove(self) -> None:
        """Let the modules compute as before."""
        for module in list(self._set):
            self._unset(module)

    def _unset(self, module: nn.Module) -> None:
        forward = self._set.pop(module, None)
        if forward is not None and vars(module).get("forward") is forward:
            del vars(module)["forward"]


def _choose(
    module: nn.Module, resident: Mapping[str, CompressedWeight], name: str
) -> Forward | None:
    """Return a forward for a module of a class whose own is known; None for others."""
    direct, own = _Direct(module, resident, name), type(module).forward
    if own is nn.Linear.forward:
        return direct.linear
    if own is nn.Embedding.forward and module.max_norm is None:
        return direct.lookup
    return direct.conv1d if is_transposed(module) and own.__module__ == _CONV1D else None


class _Direct:
    """One module's weight, while it is among the ``resident``."""

    def __init__(
        self, module: nn.Module, resident: Mapping[str, CompressedWeight], name: str
    ) -> None:
        self._parameters = module._parameters
        self._parameter = module._parameters["weight"]
        self._resident = resident
        self._name = name
        self._plain: Forward = module.forward

    def linear(self, input: Tensor) -> Tensor:
        """Compute as nn.Linear does."""
        weight, bias = self._find(input), self._parameters["bias"]
        if weight is None or isinstance(bias, OffloadedParameter):
            return self._plain(input)
        if not torch.is_grad_enabled():
            return multiply(weight, input, bias)
        if input.requires_grad:
            raise PlacementError(f"inputs require gradients, {NO_GRADIENTS}")
        with torch.no_grad():
            return multiply(weight, input, bias)

    def conv1d(self, x: Tensor) -> Tensor:
        """Compute as transformers' Conv1D does."""
        return self.linear(x)

    def lookup(self, input: Tensor) -> Tensor:
        """Look up as nn.Embedding does."""
        weight = self._find(input)
        return self._plain(input) if weight is None or not weight.looks_up else weight.rows(input)

    def _find(self, x: Any) -> CompressedWeight | None:
        """Return the weight to compute with; None where only the class's own forward can."""
        weight = self._resident.get(self._name)
        if torch.compiler.is_dynamo_compiling():
            return None if torch.compiler.is_exporting() else weight
        ordinary = (
            type(x) is Tensor
            and self._parameters["weight"] is self._parameter
            and not _len_torch_dispatch_stack()
            and _get_tracing_state() is None
            and not is_transformed()
        )
        return weight if ordinary else None
