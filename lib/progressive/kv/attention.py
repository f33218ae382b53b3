"""Attention of one token of each of several requests to the request's own states."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .pages import RequestStates


def append_tokens(
    states: Sequence[RequestStates], layer: int, keys: Tensor, values: Tensor
) -> None:
    """Add one token to each request's tail: keys and values (N, heads, dim)."""
    for request, key, value in zip(states, keys, values, strict=True):
        request.append(layer, key[None], value[None])


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
    return torch.stack(
        [
            _attend(query, *request.layers[layer].read(), scale, softcap, window)
            for query, request in zip(queries, states, strict=True)
        ]
    )


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    first = 0 if window is None else max(0, keys.shape[1] - window)
    keys, values = keys[:, first:].float(), values[:, first:].float()
    rows = query.view(len(keys), -1, query.shape[-1]).float()
    scores = rows @ keys.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    return (scores.softmax(-1) @ values).view(len(query), -1).to(query.dtype)
