"""What is rewritten in the graph of a compiled decoding step before Inductor generates code."""

import itertools
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node
from torch.utils._pytree import tree_map

from ...codecs.ops import prepare

_aten = torch.ops.aten
_ATTENTION = _aten._scaled_dot_product_flash_attention_for_cpu.default
_LINEAR = torch.ops.tierhints.linear.default
_LINEARS = torch.ops.tierhints.linears.default
_ATTEND = torch.ops.tierhints.attend.default
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
            found = _attention_of(node)
            if found is not None:
                _attend_with(graph, node, found)
        _join_linears(graph)

    def uuid(self) -> Any:
        """Key Inductor's cache with what this file does."""
        return get_hash_for_files((__file__,)), prepare("cpu")


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


@dataclass(frozen=True, slots=True)
class _Attention:
    """What one token for each sequence attends to: keys and values (B, groups, L, D), as they were
    before they were repeated for the heads of each group (grouped-query attention, Ainslie et al.
    2023, arXiv:2305.13245). Repeating copies the whole cache, in each layer and for each token.
    """

    query: Node
    key: Node
    value: Node
    mask: Node | None
    scale: float | None

    @property
    def has_own_kernel(self) -> bool:
        """Whether ``tierhints::attend`` takes it: torch's kernel multiplies matrices of a row."""
        query, key, value = (node.meta["val"] for node in (self.query, self.key, self.value))
        given = [query, key, value]
        if any(each.shape[-1] % 16 for each in given):
            return False
        if self.mask is not None:
            mask = self.mask.meta["val"]
            if mask.shape[0] not in (1, query.shape[0]) or mask.shape[3] != key.shape[2]:
                return False
            given.append(mask)
        own = all(each.is_cpu and each.dtype == torch.float32 for each in given)
        return own and prepare("cpu") == "native"


def _attention_of(attention: Any) -> _Attention | None:
    """Read a call of torch's attention; None for one that is left as it is."""
    query, key, value, *others = attention.args
    mask, scale = attention.kwargs.get("attn_mask"), attention.kwargs.get("scale")
    if others or attention.kwargs.keys() - {"attn_mask", "scale"}:  # dropout, is_causal
        return None
    if query.meta["val"].shape[2] != 1:
        return None
    if mask is not None and (mask.meta["val"].dim() != 4 or mask.meta["val"].shape[1:3] != (1, 1)):
        return None
    if any(user.users for user in attention.users if user.args[1]):  # besides what is attended
        return None
    sources = _before_repeat(key) or key, _before_repeat(value) or value
    if sources[0].meta["val"].shape[1] != sources[1].meta["val"].shape[1]:
        sources = key, value
    return _Attention(query, *sources, mask, scale)


def _attend_with(graph: Graph, attention: Any, found: _Attention) -> None:
    """Attend with the rows of a group's heads together."""
    batch, heads, _, size = found.query.meta["val"].shape
    groups, value_size = (found.value.meta["val"].shape[dim] for dim in (1, 3))
    with graph.inserting_before(attention):
        rows = _call(graph, _RESHAPE, found.query, [batch, groups, heads // groups, size])
        given = rows, found.key, found.value
        if found.has_own_kernel:
            scale = size**-0.5 if found.scale is None else found.scale
            output = _call(graph, _ATTEND, *given, found.mask, scale)
        else:
            both = _call(graph, _ATTENTION, *given, **attention.kwargs)
            output = _call(graph, operator.getitem, both, 0)
        whole = _call(graph, _RESHAPE, output, [batch, heads, 1, value_size])
    for user in list(attention.users):
        if not user.args[1]:
            user.replace_all_uses_with(whole)
        graph.erase_node(user)
    graph.erase_node(attention)


def _call(graph: Graph, function: Any, *args: Any, **kwargs: Any) -> Any:
    called = graph.call_function(function, args, kwargs)
    known = tree_map(lambda arg: arg.meta["val"] if isinstance(arg, Node) else arg, (args, kwargs))
    called.meta["val"] = function(*known[0], **known[1])
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
