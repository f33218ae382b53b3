"""What is rewritten in the graph of a compiled decoding step before Inductor generates code."""

import itertools
import operator
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node
from torch.utils._pytree import tree_map

_aten = torch.ops.aten
_ATTENTION = _aten._scaled_dot_product_flash_attention_for_cpu.default
_LINEAR = torch.ops.tierhints.linear.default
_LINEARS = torch.ops.tierhints.linears.default
_RESHAPE = _aten.reshape.default
_COPIES = (
    _RESHAPE,
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.clone.default,
)


class DecodingPass(CustomGraphPass):
    """Rewrites the graph of a step of one token for each sequence."""

    def __call__(self, graph: Graph) -> None:
        """Rewrite in place."""
        for node in graph.find_nodes(op="call_function", target=_ATTENTION):
            _share_heads(graph, node)
        _join_linears(graph)

    def uuid(self) -> Any:
        """Key Inductor's cache with what this file does."""
        return get_hash_for_files((__file__,))


def _join_linears(graph: Graph) -> None:
    """Multiply the same activations by several matrices in one call (queries, keys and values; gate
    and up): waking the threads takes as long as a small matrix, and activations are quantized
    once.
    """
    alike: dict[Any, list[Any]] = {}
    for node in graph.find_nodes(op="call_function", target=_LINEAR):
        x, record, bias, _, *layout = node.args
        given = all(part is None or part.op == "placeholder" for part in (record, bias))
        if given and x.meta["val"].is_cpu:
            alike.setdefault((x, *layout), []).append(node)
    for nodes in alike.values():
        if len(nodes) == 1:
            continue
        records, biases, rows = (
            list(each) for each in zip(*(n.args[1:4] for n in nodes), strict=True)
        )
        x, _, _, _, *layout = nodes[0].args  # as it is now: it may have been joined itself
        with graph.inserting_before(nodes[0]):
            whole = _call(graph, _LINEARS, x, records, biases, rows, *layout)
            ends = itertools.accumulate(rows)
            for node, end in zip(nodes, ends, strict=True):
                part = _call(graph, _aten.slice.Tensor, whole, -1, end - node.args[3], end)
                node.replace_all_uses_with(part)
        for node in nodes:
            graph.erase_node(node)


def _share_heads(graph: Graph, attention: Any) -> None:
    """Attend with the rows of a group's heads together where keys and values were repeated for each
    head (grouped-query attention, Ainslie et al. 2023, arXiv:2305.13245): that copies the whole
    cache, in each layer and for each token.
    """
    query, key, value, *others = attention.args
    mask = attention.kwargs.get("attn_mask")
    sources = _before_repeat(key), _before_repeat(value)
    shape = query.meta["val"].shape
    if others or attention.kwargs.get("is_causal") or None in sources or shape[2] != 1:
        return
    if mask is not None and tuple(mask.meta["val"].shape[1:3]) != (1, 1):
        return
    batch, heads, _, size = shape
    shared = sources[0].meta["val"].shape[1]
    if sources[1].meta["val"].shape[1] != shared:
        return
    with graph.inserting_before(attention):
        rows = _call(graph, _RESHAPE, query, [batch, shared, heads // shared, size])
    attention.args = (rows, *sources)
    for output in list(attention.users):
        if output.target is operator.getitem and output.args[1] == 0:
            output.meta["val"] = output.meta["val"].new_empty(rows.meta["val"].shape)
            with graph.inserting_after(output):
                whole = _call(graph, _RESHAPE, output, [batch, heads, 1, size])
            output.replace_all_uses_with(whole)
            whole.args = (output, [batch, heads, 1, size])


def _call(graph: Graph, function: Any, *args: Any) -> Any:
    called = graph.call_function(function, args)
    known = tree_map(lambda arg: arg.meta["val"] if isinstance(arg, Node) else arg, args)
    called.meta["val"] = function(*known)
    return called


def _before_repeat(repeated: Any) -> Any:
    """Return the (B, groups, L, D) of which each was repeated for the heads of its group."""
    node = repeated
    while node.target in _COPIES:
        node = node.args[0]
    if node.target is not _aten.expand.default:
        return None
    expanded, unsqueezed = node.meta["val"].shape, node.args[0]
    if unsqueezed.target is not _aten.unsqueeze.default or unsqueezed.args[1] != 2:
        return None
    if len(expanded) != 5:
        return None
    batch, groups, times, length, size = expanded
    source: Any = unsqueezed.args[0]
    if source.meta["val"].shape != (batch, groups, length, size):
        return None
    return source if repeated.meta["val"].shape == (batch, groups * times, length, size) else None
