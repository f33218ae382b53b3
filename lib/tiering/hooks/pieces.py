"""The graph of a decoding step cut into pieces, each of which is compiled by itself.

Weights are arguments of a piece. So what repeats, as the layers of a decoder do, is compiled once:
pieces of the same operations on the same shapes are one function. Where weights stream, a piece
computes with those of one module, which come before it begins and may go when it ends.
"""

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg


class CannotCut(Exception):
    """A graph that has no such pieces, and why."""


@dataclass(frozen=True, slots=True)
class Place:
    """Whose a weight is. ``streamed``: the group that it comes with; ``by_rows``: in shards, at the
    request of operations, so that these run as they are.
    """

    layer: int | None = None
    streamed: str | None = None
    by_rows: bool = False


@dataclass(slots=True, eq=False)
class Piece:
    """Operations that run together, and where the matrices are that they multiply by."""

    layer: int | None = None
    place: Place | None = None
    """None: it multiplies by none so far."""
    nodes: list[Node] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Function:
    """What a piece computes: from values of the step, named by their nodes, to others."""

    module: GraphModule
    place: Place
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    key: tuple[Any, ...]
    """Equal where another piece computes the same from other tensors."""


def make_functions(graph: Graph, places: Mapping[Node, Place]) -> list[Function]:
    """Make a graph the functions of its pieces, one after the other. ``places``: of the nodes that
    are weights. Raises CannotCut.
    """
    (output,) = graph.find_nodes(op="output")
    needed = set(output.all_input_nodes)
    functions: list[Function] = []
    for piece in reversed(cut(graph, places)):
        functions.append(_extract(piece, [node for node in piece.nodes if node in needed]))
        needed |= set(functions[-1].inputs)
    return functions[::-1]


def cut(graph: Graph, places: Mapping[Node, Place]) -> list[Piece]:
    """Cut a graph where the weights of another layer begin, and those of another module that
    streams; what takes weights by rows is a piece by itself.
    """
    pieces, homes = [Piece()], dict[Node, Piece]()
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        if node.target is operator.getitem and node.args[0] in homes:
            piece = homes[node.args[0]]  # of several results: tensors alone go to other pieces
        else:
            used = {each: places[each] for each in node.all_input_nodes if each in places}
            piece = _find_piece(pieces, used)
        piece.nodes.append(node)
        homes[node] = piece
    return [piece for piece in pieces if piece.nodes]


def _find_piece(pieces: list[Piece], used: Mapping[Node, Place]) -> Piece:
    """Return the piece that an operation with these weights belongs to: the last, or a new one."""
    streamed = {place for place in used.values() if place.streamed is not None}
    if len(streamed) > 1:
        raise CannotCut("an operation takes weights of several modules that stream")
    for weight, place in used.items():
        last = pieces[-1]
        decides = place.streamed is not None or is_matrix(value_of(weight))
        other = last.place is not None and last.place != place
        if (decides and other) or (last.place is not None and last.layer != place.layer):
            pieces.append(Piece())
        pieces[-1].layer = place.layer
        if decides:
            pieces[-1].place = place
    return pieces[-1]


def is_matrix(weight: Tensor) -> bool:
    """Say whether a weight is a matrix, or the record of one."""
    return weight.dim() > 1 or weight.dtype == torch.uint8


def value_of(node: Node) -> Tensor:
    """Return the fake tensor that a node gives."""
    value = node.meta.get("example_value")
    if not isinstance(value, Tensor):
        raise CannotCut(f"{node.target} gives no tensor, and two pieces of the graph share it")
    return value


def _extract(piece: Piece, outputs: list[Node]) -> Function:
    graph, inside = Graph(), set(piece.nodes)
    given = dict.fromkeys(
        each for node in piece.nodes for each in node.all_input_nodes if each not in inside
    )
    made = {each: graph.placeholder(f"input_{number}") for number, each in enumerate(given)}
    for node in piece.nodes:
        made[node] = graph.node_copy(node, made.__getitem__)
    graph.output(tuple(made[each] for each in outputs))
    if piece.place is not None and piece.place.streamed is not None:
        weights = [each for each in given if each.op == "get_attr"]
        for each in outputs:
            _refuse_view(each, weights)
    return Function(
        module=GraphModule(torch.nn.Module(), graph),
        place=piece.place or Place(),
        inputs=tuple(given),
        outputs=tuple(outputs),
        key=(tuple(map(_describe, map(value_of, given))), _operations(graph)),
    )


def _describe(value: Tensor) -> tuple[Any, ...]:
    return tuple(value.shape), value.stride(), value.dtype, value.device


def _operations(graph: Graph) -> tuple[Any, ...]:
    """Return the operations of a graph, whatever its nodes are called."""
    numbers = {node: f"%{number}" for number, node in enumerate(graph.nodes)}
    return tuple(
        (
            node.op,
            None if node.op == "placeholder" else node.target,
            repr(map_arg((node.args, node.kwargs), numbers.__getitem__)),
        )
        for node in graph.nodes
    )


def _refuse_view(result: Node, weights: Iterable[Node]) -> None:
    """Refuse that a piece gives others a view of weights that are gone then."""
    storage = value_of(result).untyped_storage()._cdata
    if any(value_of(weight).untyped_storage()._cdata == storage for weight in weights):
        raise CannotCut(f"{result.target} gives a view of weights to another piece of the graph")
