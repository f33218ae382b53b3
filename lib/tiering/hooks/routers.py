"""The norm and the router of a layer with experts, found by what they return in a forward.

The router is the module whose output holds the ids that the experts are called with, the norm the
one whose output the experts' block is called with. Asked about another hidden state they are called
themselves, unless that forward shows that the norm is an RMSNorm and the router takes the largest
of a linear map: then three operations do, where the modules take twenty.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from ..residency.stand_ins import OffloadedParameter, plain_tensors

_CLOSE = 1e-2
"""Relative difference within which an RMSNorm is one, in whatever precision it computes."""


@dataclass(slots=True, eq=False)
class RoutedLayer:
    """A layer with experts, and what was learnt of it."""

    module: nn.Module
    block: nn.Module
    routers: list[nn.Module]
    others: list[nn.Module]
    num_experts: int
    norm: nn.Module | None = None
    router: nn.Module | None = None
    place: int = 0
    """Of the ids in the router's output."""
    flat: bool = False
    """The router takes (tokens, width)."""
    epsilon: float | None = None
    """Of the norm, if it is an RMSNorm with a weight."""
    is_linear: bool = False
    """The router takes the largest of a linear map."""
    routed: int = 0
    seen: dict[int, tuple[nn.Module, Any]] = field(default_factory=dict)
    """Outputs of this forward by identity of their tensors, while it is learnt."""
    input: Tensor | None = None
    """What the block was called with, while it is learnt."""

    @property
    def is_known(self) -> bool:
        """Its routing can be predicted now."""
        return self.router is not None and self.norm is not None and _is_here(self.norm)

    def predict(self, hidden: Tensor) -> list[int]:
        """Return the experts that its router would choose for a hidden state (batch, tokens,
        width).
        """
        assert self.norm is not None and self.router is not None
        if self.is_linear and self.epsilon is not None and _is_here(self.router):
            bias = self.router._parameters.get("bias")
            if bias is None:  # the norm's division changes no order
                x = hidden * _weight(self.norm)
            else:
                x = F.rms_norm(hidden, hidden.shape[-1:], _weight(self.norm), self.epsilon)
            logits = F.linear(x.reshape(-1, x.shape[-1]), _weight(self.router), bias)
            return logits.topk(self.routed).indices.flatten().tolist()
        with plain_tensors():
            x = type(self.norm).forward(self.norm, hidden)
            if self.flat:
                x = x.reshape(-1, x.shape[-1])
            ids: Tensor = type(self.router).forward(self.router, x)[self.place]
            return ids.flatten().tolist()

    def learn_by(self) -> list[RemovableHandle]:
        """Watch the next forward; returns the hooks that do."""
        handles = [
            module.register_forward_hook(_remember(self))
            for module in (*self.others, *self.routers)
        ]
        handles.append(
            self.block.register_forward_pre_hook(_remember_input(self), with_kwargs=True)
        )
        return handles

    def learn(self, index: Tensor) -> bool:
        """Find norm and router by what they returned in this forward, whose experts are called with
        ``index`` (tokens, k); returns whether they are known.
        """
        router, norm = self.seen.get(id(index)), self.seen.get(id(self.input))
        if router is not None and norm is not None:
            module, (args, outputs) = router
            if module in self.routers and len(args) == 1 and norm[0] in self.others:
                self._adopt(module, args[0], outputs, index)
                self._adopt_norm(norm[0], *norm[1])
        self.seen.clear()
        self.input = None
        return self.norm is not None

    def _adopt(self, router: nn.Module, x: Tensor, outputs: Any, index: Tensor) -> None:
        self.place = next(place for place, each in enumerate(outputs) if each is index)
        self.flat = x.dim() == 2
        self.router, self.routed = router, index.shape[-1]
        shapes = {name: tuple(each.shape) for name, each in router.named_parameters()}
        size = (self.num_experts, x.shape[-1])
        if _is_here(router) and shapes in ({"weight": size}, {"weight": size, "bias": size[:1]}):
            with torch.no_grad():
                ids = _linear(router, x.reshape(-1, x.shape[-1])).topk(self.routed).indices
            self.is_linear = torch.equal(ids.sort().values, index.sort().values)

    def _adopt_norm(self, norm: nn.Module, args: Any, outputs: Any) -> None:
        self.norm = norm
        epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        names = [name for name, _ in norm.named_parameters()]
        if isinstance(epsilon, float) and names == ["weight"] and _is_here(norm) and args:
            with torch.no_grad():
                x = F.rms_norm(args[0], args[0].shape[-1:], _weight(norm), epsilon)
                error = (x - outputs[0]).float().norm()
                if error <= _CLOSE * outputs[0].float().norm():
                    self.epsilon = epsilon


def find_layer(model: nn.Module, name: str) -> RoutedLayer | None:
    """Return the layer that has an experts module, an element of a list; None where none has."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if isinstance(model.get_submodule(".".join(parts[: end - 1])), nn.ModuleList):
            module = model.get_submodule(".".join(parts[:end]))
            block = model.get_submodule(".".join(parts[:-1]))
            experts = model.get_submodule(name)
            return RoutedLayer(
                module=module,
                block=block,
                routers=[each for each in block.children() if each is not experts],
                others=[each for each in module.children() if each is not block],
                num_experts=next(experts.parameters()).shape[0],
            )
    return None


def _remember(layer: RoutedLayer) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    def remember(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        for each in outputs:
            if isinstance(each, Tensor):
                layer.seen[id(each)] = module, (args, outputs)

    return remember


def _remember_input(
    layer: RoutedLayer,
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer.input = args[0] if args else kwargs.get("hidden_states")

    return remember


def _is_here(module: nn.Module) -> bool:
    for parameter in module._parameters.values():  # a norm or a router has no others
        if isinstance(parameter, OffloadedParameter):
            return False
    return True


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _linear(router: nn.Module, x: Tensor) -> Tensor:
    bias = getattr(router, "bias", None)
    return F.linear(x, _weight(router), bias)
