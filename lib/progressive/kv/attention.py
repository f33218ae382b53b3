"""Attention of one token of each of several requests to the request's own states.

On a CPU one call of our kernel (codecs/native/pages.cpp) computes all requests of a layer, from the
codes of their pages and not from what they stand for. Elsewhere, and for what the kernel doesn't
take (fp16, heads whose sizes aren't multiples of 16), torch computes from decoded states, one
request after the other. Pages of codes pad a head's numbers to 64: smaller heads waste the rest.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...codecs import ops
from .layer_states import LayerStates
from .pages import RequestStates


def append_tokens(
    states: Sequence[RequestStates], layer: int, keys: Tensor, values: Tensor
) -> None:
    """Add one token to each request's tail: keys and values (N, heads, dim)."""
    layers = [request.layers[layer] for request in states]
    if not _fit_kernel(layers):
        for request, key, value in zip(states, keys, values, strict=True):
            request.append(layer, key[None], value[None])
        return
    tokens = [one.length for one in layers]
    torch.ops.tierhints.append_states(keys, values, [one.extend() for one in layers], tokens)


def append_rows(states: RequestStates, layer: int, keys: Tensor, values: Tensor) -> None:
    """Add successive tokens of one request to its tail: keys and values (T, heads, dim)."""
    one = states.layers[layer]
    if not _fit_kernel([one]):
        states.append(layer, keys, values)
        return
    start = one.length
    one.resize(start + len(keys))
    tokens = range(start, start + len(keys))
    torch.ops.tierhints.append_states(keys, values, [one.table] * len(keys), tokens)


def read_rows(states: RequestStates, layer: int, start: int, keys: Tensor, values: Tensor) -> None:
    """Copy full tokens from ``start`` on to keys and values (T, heads, dim), contiguous."""
    one = states.layers[layer]
    if _fit_kernel([one]):
        torch.ops.tierhints.read_states(one.table, start, keys, values)
        return
    found = one.read_full(start, start + len(keys))
    for to, side in zip((keys, values), found, strict=True):
        to.copy_(side.transpose(0, 1))


def attend(
    queries: Tensor,
    states: Sequence[RequestStates],
    layer: int,
    scale: float,
    *,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Attend with a query of each request, (N, query heads, key_dim), to all of its states.

    The query's own key and value are the last. ``softcap``: scores become softcap * tanh(score /
    softcap), after ``scale``. ``window``: only so many of the last tokens are seen. Returns (N,
    query heads, value_dim); what a request gets doesn't depend on the others.
    """
    layers = [request.layers[layer] for request in states]
    if not _fit_kernel(layers):
        return attend_reference(queries, layers, scale, softcap=softcap, window=window)
    tables, lengths = [one.table for one in layers], [one.length for one in layers]
    attend_pages = torch.ops.tierhints.attend_pages
    found: Tensor = attend_pages(queries, tables, lengths, scale, softcap or 0.0, window or 0)
    return found


def attend_reference(
    queries: Tensor,
    layers: Sequence[LayerStates],
    scale: float,
    *,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Compute what ``attend`` does, in torch alone, from decoded states in fp32."""
    found = []
    for query, one in zip(queries, layers, strict=True):
        first = 0 if window is None else max(0, one.length - window)
        keys, values = (side[:, first:].float() for side in one.read())
        rows = query.view(len(keys), -1, query.shape[-1]).float()
        scores = rows @ keys.transpose(-1, -2) * scale
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        found.append((scores.softmax(-1) @ values).view(len(query), -1).to(query.dtype))
    return torch.stack(found)


def _fit_kernel(layers: Sequence[LayerStates]) -> bool:
    return all(one.fits_kernel for one in layers) and ops.prepare("cpu") == "native"
