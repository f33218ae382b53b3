"""A decoding step of a plan that streams weights, compiled in pieces.

torch.compile traces the step once, with what stands for the weights that are away. A piece of its
graph (``pieces``) is compiled at its first run, and in Python between two pieces modules' hooks
wait for weights in their slots, and give them back.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from ...codecs.expansion import Expansion
from ..residency.held import HeldGroup
from ..residency.residency import Residency
from ..residency.stand_ins import plain_tensors
from .group_hook import GroupHook
from .pieces import Function, Place, make_functions

Context = Callable[[], contextlib.AbstractContextManager[None]]
Compute = Callable[..., Sequence[Any]]


class StreamedStep:
    """Compiles decoding steps of the plan that a residency is under; a backend of torch.compile.

    ``hooks`` are those of the modules. In ``as_resident`` nothing around them refuses a trace; in
    ``undisturbed`` the plan stays as it is.
    """

    def __init__(
        self,
        residency: Residency,
        hooks: Iterable[GroupHook],
        *,
        as_resident: Context,
        undisturbed: Context,
        compile: Callable[[GraphModule, list[Any]], Compute],
    ) -> None:
        self._residency = residency
        self._hooks = {(group.name, hook.lookup): hook for hook in hooks for group in hook.groups}
        self._as_resident = as_resident
        self._undisturbed = undisturbed
        self._compile = compile
        self._weights: dict[int, _Weight] = {}
        """By the identity of what a trace meets of them."""
        self._trace = contextlib.ExitStack()
        self.compiled: dict[Any, _Compiled] = {}
        """What serves pieces of every plan, by what it computes."""
        self._refused: set[str] = set()
        """Why pieces run as they are."""
        self.num_pieces = 0
        """Of the step that was traced last."""

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        """Let weights that are away look as if they were there, until what was traced runs."""
        moving, device = self._residency.moving, self._residency.memory.device
        size = max((unit.num_bytes for group in moving for unit in group.units), default=0)
        with self._trace as stack:
            with plain_tensors():
                blank = torch.empty(size, dtype=torch.uint8, device=device)
            for group in moving:
                stack.enter_context(group.pretending(blank))
            stack.enter_context(self._as_resident())
            for group in self._residency.groups.values():
                self._weights |= self._find_weights(group)
            stack.callback(self._weights.clear)
            yield

    def __call__(self, traced: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Return what runs the pieces of a step."""
        fixed = {node: _attribute(traced, node) for node in traced.graph.find_nodes(op="get_attr")}
        weights = {
            node: self._weights[id(tensor)]
            for node, tensor in fixed.items()
            if id(tensor) in self._weights
        }
        places = {node: weight.place for node, weight in weights.items()}
        nodes = [*traced.graph.find_nodes(op="placeholder"), *fixed]
        numbers = {node: number for number, node in enumerate(nodes)}
        pieces: list[_Piece] = []
        for function in make_functions(traced.graph, places):
            for node in function.outputs:
                numbers[node] = len(numbers)
            pieces.append(self._make_piece(function, numbers, weights))
        self.num_pieces = len(pieces)
        found = [None if _is_in_slot(weights.get(node)) else fixed[node] for node in fixed]
        later = [None] * (len(numbers) - len(nodes))
        (output,) = traced.graph.find_nodes(op="output")
        results = [numbers[node] for node in output.args[0]]

        def run(*given: Any) -> Any:
            self._trace.close()
            values = [*given, *found, *later]
            with self._undisturbed():
                for piece in pieces:
                    piece.run(values)
            return [values[number] for number in results]

        return run

    def _make_piece(
        self, function: Function, numbers: Mapping[Node, int], weights: Mapping[Node, "_Weight"]
    ) -> "_Piece":
        place = function.place
        compute: Compute = function.module
        if not place.by_rows:
            new = _Compiled(function.module, self._compile_or_not)
            compute = self.compiled.setdefault(function.key, new)
        hook = None
        if place.streamed is not None:
            lookup = bool(function.module.graph.find_nodes(op="call_function", target=F.embedding))
            hook = self._hooks[place.streamed, lookup and place.by_rows]
        return _Piece(
            hook=hook,
            compute=compute,
            inputs=[numbers[node] for node in function.inputs],
            in_slots=[
                (position, weights[node])
                for position, node in enumerate(function.inputs)
                if _is_in_slot(weights.get(node))
            ],
            outputs=[numbers[node] for node in function.outputs],
        )

    def _compile_or_not(self, module: GraphModule, inputs: list[Any]) -> Compute:
        """Compile a piece; where that can't be done it runs as it is."""
        try:
            return self._compile(module, inputs)
        except Exception as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            if reason not in self._refused:
                self._refused.add(reason)
                warnings.warn(
                    f"a part of a decoding step runs uncompiled: {reason}",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return module

    def _find_weights(self, group: HeldGroup) -> dict[int, "_Weight"]:
        streamed = group.name if group.units else None
        place = Place(group.payload.group.layer, streamed, by_rows=group.by_rows)
        found: dict[int, _Weight] = {}
        for part in group.payload.parts:
            if not group.weights.is_away(part):
                parameter = group.weights.parameter(part)
                found[id(parameter)] = _Weight(place, parameter)
                continue
            for tensor in _tensors(group.weights.ops(part)):
                found[id(tensor)] = _Weight(place, tensor, group if group.units else None)
        return found


@dataclass(frozen=True, slots=True)
class _Weight:
    """A weight, or a part of its record, as a trace meets it. ``group``: it is in a slot then."""

    place: Place
    tensor: Tensor
    group: HeldGroup | None = None

    def find(self) -> Tensor:
        """Return it as it is in the slot now."""
        assert self.group is not None and self.group.weights.shown is not None
        offset = self.tensor.storage_offset() * self.tensor.element_size()
        there = self.group.weights.shown[offset:].view(self.tensor.dtype)
        return there.as_strided(self.tensor.size(), self.tensor.stride())


@dataclass(frozen=True, slots=True)
class _Piece:
    """A piece as it runs. ``inputs`` and ``outputs`` are numbers of the step's values."""

    hook: GroupHook | None
    compute: Compute
    inputs: list[int]
    in_slots: list[tuple[int, _Weight]]
    outputs: list[int]

    def run(self, values: list[Any]) -> None:
        """Compute, with weights that are there for as long as it takes."""
        with contextlib.nullcontext() if self.hook is None else self.hook.hold((), {}):
            inputs = [values[number] for number in self.inputs]
            for position, weight in self.in_slots:
                inputs[position] = weight.find()
            results = self.compute(*inputs)
            del inputs  # views of a slot that is given back
        for number, result in zip(self.outputs, results, strict=True):
            values[number] = result


class _Compiled:
    """A function that is compiled when it is first called."""

    def __init__(
        self, module: GraphModule, compile: Callable[[GraphModule, list[Any]], Compute]
    ) -> None:
        self._module = module
        self._compile = compile
        self._compute: Compute | None = None

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        if self._compute is None:
            self._compute = self._compile(self._module, list(inputs))
        return self._compute(*inputs)


def _is_in_slot(weight: _Weight | None) -> bool:
    return weight is not None and weight.group is not None


def _attribute(traced: GraphModule, node: Node) -> Any:
    found: Any = traced
    for name in str(node.target).split("."):
        found = getattr(found, name)
    return found


def _tensors(holder: Any) -> Iterator[Tensor]:
    """Find the tensors from which weights in another form compute."""
    for value in vars(holder).values():
        if isinstance(value, Expansion):
            yield from _tensors(value)
        elif isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (each for each in value if isinstance(each, Tensor))
