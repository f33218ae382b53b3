"""A decoding step of a plan that streams weights, compiled in pieces.

torch.compile traces the step once, with what stands for the weights that are away. A piece of its
graph (``pieces``) is compiled at its first run, and in Python between two pieces modules' hooks
wait for weights in their slots, and give them back.
"""

import contextlib
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.nn import functional as F

from ...codecs.encoded import EncodedWeight
from ...codecs.expansion import Expansion
from ..payload.parts import Part
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
        self._hooks: dict[str, list[GroupHook]] = {}
        for hook in hooks:
            for group in hook.groups:
                self._hooks.setdefault(group.name, []).append(hook)
        self._as_resident = as_resident
        self._undisturbed = undisturbed
        self._compile = compile
        self._weights: dict[int, _Weight] = {}
        """By the identity of what the present trace meets of them."""
        self._steps: list[_Traced] = []
        self._held: list[object] = []
        """How weights looked to the traces of these."""
        self._trace = contextlib.ExitStack()
        self.compiled: dict[Any, _Compiled] = {}
        """What serves pieces of every plan, by what it computes."""
        self._refused: set[str] = set()
        """Why pieces run as they are."""
        self.num_pieces = 0
        """Of the step that was cut last."""

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
        traced.graph.owning_module = None  # which has the weights as they are now
        step = _Traced(
            graph=traced.graph,
            fixed={node: tensor for node, tensor in fixed.items() if node not in weights},
            weights=weights,
        )
        self._steps.append(step)
        self._held = self._describe_held()

        def run(*given: Any) -> Any:
            self._trace.close()
            if step.cut is None:
                step.cut = self._cut(step)
            values = [*given, *step.cut.values]
            with self._undisturbed():
                for piece in step.cut.pieces:
                    piece.run(values)
            return [values[number] for number in step.cut.results]

        return run

    def follow(self) -> bool:
        """Go by another plan; returns whether what was traced is of use for it: weights have been
        elsewhere, but in the same form.
        """
        for step in self._steps:
            step.cut = None
        now = self._describe_held()
        same = len(now) == len(self._held) and all(map(operator.is_, now, self._held))
        return same

    def forget(self) -> None:
        """Let go of what was traced."""
        self._steps.clear()

    def _describe_held(self) -> list[object]:
        """Return what decides how weights look to a trace."""
        found: list[object] = []
        for group in self._residency.groups.values():
            found += [group.payload, group.payload.lossy and group.by_rows]
            found += [w for w in group.weights.compressed.values() if type(w) is not EncodedWeight]
        return found

    def _cut(self, step: "_Traced") -> "_Cut":
        """Cut a step for the present plan."""
        places = {node: weight.place for node, weight in step.weights.items()}
        first = [*step.graph.find_nodes(op="placeholder"), *step.fixed, *step.weights]
        numbers = {node: number for number, node in enumerate(first)}
        pieces: list[_Piece] = []
        for function in make_functions(step.graph, places):
            for node in function.outputs:
                numbers[node] = len(numbers)
            pieces.append(self._make_piece(function, numbers, step.weights))
        self.num_pieces = len(pieces)
        there = [None if weight.in_slot else weight.find() for weight in step.weights.values()]
        later = [None] * (len(numbers) - len(first))
        (output,) = step.graph.find_nodes(op="output")
        return _Cut(
            pieces=pieces,
            values=[*step.fixed.values(), *there, *later],
            results=[numbers[node] for node in output.args[0]],
        )

    def _make_piece(
        self, function: Function, numbers: Mapping[Node, int], weights: Mapping[Node, "_Weight"]
    ) -> "_Piece":
        place, hook = function.place, None
        compute: Compute = function.module
        if not place.by_rows:
            new = _Compiled(function.module, self._compile_or_not)
            compute = self.compiled.setdefault(function.key, new)
        if place.streamed is not None:
            lookup = bool(function.module.graph.find_nodes(op="call_function", target=F.embedding))
            hooks = self._hooks[place.streamed]
            hook = next((hook for hook in hooks if hook.lookup == lookup), hooks[0])
        return _Piece(
            hook=hook,
            compute=compute,
            inputs=[numbers[node] for node in function.inputs],
            in_slots=[
                (position, weights[node])
                for position, node in enumerate(function.inputs)
                if node in weights and weights[node].in_slot
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
        """Find the tensors that a trace meets of a group's weights."""
        found: dict[int, _Weight] = {}
        for part in group.payload.parts:
            if not group.weights.is_away(part):
                parameter = group.weights.parameter(part)
                found[id(parameter)] = _Weight(group, part, parameter)
                continue
            held = group.weights.ops(part)
            for tensor in _tensors(held):
                whole = held.record if isinstance(held, EncodedWeight) else None
                found[id(tensor)] = _Weight(group, part, tensor, whole)
        return found


@dataclass(slots=True, eq=False)
class _Traced:
    """The graph of a step. ``fixed``: the tensors of its attributes, but for the ``weights``;
    ``cut``: what it is under the present plan.
    """

    graph: Graph
    fixed: dict[Node, Any]
    weights: dict[Node, "_Weight"]
    cut: "_Cut | None" = None


@dataclass(frozen=True, slots=True)
class _Cut:
    """Pieces to run one after the other, on numbered values: those given, then these."""

    pieces: list["_Piece"]
    values: list[Any]
    results: list[int]


class _Weight:
    """A parameter, or what a trace meets of a ``record``, wherever it is now."""

    def __init__(
        self, group: HeldGroup, part: Part, tensor: Tensor, record: Tensor | None = None
    ) -> None:
        self._group = group
        self._part = part
        self._tensor = tensor if record is None else None
        if record is not None:
            size = tensor.element_size()
            self._begin = tensor.storage_offset() * size - record.storage_offset()
            last = sum(
                (n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)
            )
            self._end = self._begin + (last + 1) * size
            self._layout = tensor.dtype, tensor.shape, tensor.stride()

    @property
    def place(self) -> Place:
        """Where it is."""
        group = self._group
        streamed = group.name if group.units else None
        return Place(group.payload.group.layer, streamed, by_rows=group.by_rows)

    @property
    def in_slot(self) -> bool:
        """It is elsewhere with each step."""
        return self._tensor is None and bool(self._group.units)

    def find(self) -> Tensor:
        """Return it."""
        if self._tensor is not None:
            return self._tensor
        weights, begin, end = self._group.weights, self._begin, self._end
        if weights.shown is not None:
            record = weights.shown
            begin, end = begin + self._part.offset, end + self._part.offset
        else:
            held = weights.compressed[self._part.parameter]
            assert isinstance(held, EncodedWeight)
            record = held.record
        dtype, shape, stride = self._layout
        return record[begin:end].view(dtype).as_strided(shape, stride)


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
