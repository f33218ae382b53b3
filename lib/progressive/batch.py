"""Attention of a packed batch: rows of many requests in one forward, each over its own states.

A model of transformers computes its linear layers over all rows at once and hands queries, keys and
values to the attention function that is registered here; this one gives the rows of each request
what belongs to it (selective batching: Yu et al. 2022, Orca, OSDI, section 3.2). Rows are of two
kinds. A *decoded* token attends to what its request has in fast memory: compact pages and the full
tokens after them. The rows of a *pass* (a prompt's piece, a window to check) attend to the full
state: pages are read from the originals, a layer at a time, into a slot that all requests share,
while the layer before is computed.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..tiering.stores.base import aligned_buffer
from .kv.attention import append_rows, append_tokens, attend, read_rows
from .kv.originals import Originals
from .kv.pages import RequestStates
from .ladder import PAGE_TOKENS, SINK_TOKENS, KvShape, KvTier

NAME = "tierhints_requests"
"""Of the attention function."""
_FEW_ROWS = 64
"""Of queries: with more, what reading keys and values once saves is little, and masks are large."""
_UNKNOWN = ("s_aux", "position_bias", "head_mask")
"""What some models hand to attention, and this doesn't compute."""


@dataclass(slots=True, kw_only=True)
class Rows:
    """Successive tokens of one request in a batch."""

    ids: Sequence[int]
    start: int
    """Position of the first."""
    states: RequestStates
    originals: Originals | None
    """What a pass reads pages from, and writes them to; None: the states' own pages are full."""
    is_pass: bool
    settles: bool = False
    """Whether pages are made at once, layer by layer: the rows are a prompt's."""
    kept: int = 1
    """So many of the last rows' logits are wanted."""
    failure: Exception | None = None
    """What happened to its states: its rows are worthless then, the others' are not."""


class Slot:
    """Room for one layer of a request in full, twice: one is read into while the other is used."""

    def __init__(self, shape: KvShape, tokens: int, dtype: torch.dtype) -> None:
        # Pages begin at a sector, behind room for the first tokens; the latest come after them.
        self._rows = PAGE_TOKENS + -(-tokens // PAGE_TOKENS) * PAGE_TOKENS
        self._buffers = [
            [self._allocate(shape, dim, dtype) for dim in (shape.key_dim, shape.value_dim)]
            for _ in range(2)
        ]
        self._turn = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of both."""
        return sum(buffer.nbytes for pair in self._buffers for buffer in pair)

    def take(self) -> list[Tensor]:
        """Return the buffers of keys and values whose turn it is."""
        self._turn = 1 - self._turn
        return self._buffers[self._turn]

    def rebuild(self, states: RequestStates, tier: KvTier, originals: Originals | None) -> None:
        """Hold a request's pages at another tier, from its originals; None: it has no pages."""
        pages = originals.pages if originals else 0
        for layer in range(states.shape.layers):
            keys, values = (pages_of(buffer, pages) for buffer in self.take())
            if originals is not None:
                originals.read(layer, pages, keys, values)
            states.rebuild(layer, tier, keys, values)

    def _allocate(self, shape: KvShape, dim: int, dtype: torch.dtype) -> Tensor:
        num_bytes = self._rows * shape.heads * dim * shape.itemsize
        return aligned_buffer(num_bytes).view(dtype).view(self._rows, shape.heads, dim)


def pages_of(buffer: Tensor, pages: int) -> Tensor:
    """Return where pages lie in a slot's buffer."""
    return buffer[PAGE_TOKENS : PAGE_TOKENS * (1 + pages)]


def assemble(
    buffers: Sequence[Tensor], pages: int, states: RequestStates, layer: int, new: Sequence[Tensor]
) -> list[Tensor]:
    """Put a text's first tokens before the pages that lie in a slot's buffers, its latest and new
    ones (keys, values) behind them; return all keys and all values.
    """
    length, tail_start = states.layers[layer].length, states.layers[layer].tail_start
    start, end = PAGE_TOKENS - SINK_TOKENS, PAGE_TOKENS * (1 + pages)
    middle = end + length - tail_start
    last = middle + len(new[0])
    read_rows(states, layer, 0, *(buffer[start:PAGE_TOKENS] for buffer in buffers))
    read_rows(states, layer, tail_start, *(buffer[end:middle] for buffer in buffers))
    for buffer, added in zip(buffers, new, strict=True):
        buffer[middle:last] = added
    return [buffer[start:last] for buffer in buffers]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionKind:
    """What a layer's attention is: see transformers' own functions."""

    scale: float
    softcap: float | None = None
    window: int | None = None
    """Latest tokens that a query sees, itself among them."""


class Batch:
    """The rows of one step, and the attention that they get. Decoded tokens come first."""

    def __init__(
        self, rows: Sequence[Rows], shape: KvShape, slot: Slot, reader: ThreadPoolExecutor
    ) -> None:
        self.rows = sorted(rows, key=lambda each: each.is_pass)
        self._decoded = [each for each in self.rows if not each.is_pass]
        self._passes = [each for each in self.rows if each.is_pass]
        self._shape, self._slot, self._reader = shape, slot, reader
        readers = [each for each in self._passes if each.originals and each.originals.pages]
        self._reads = iter([(layer, each) for layer in range(shape.layers) for each in readers])
        self._next: tuple[int, Rows, Future[list[Tensor]]] | None = None
        self._masks: dict[tuple[int, int, AttentionKind], Tensor | None] = {}
        """By numbers of queries and of keys, and kind: layers share them."""
        self._read_ahead()

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, kind: AttentionKind
    ) -> Tensor:
        """Return (R, query heads, value_dim) for queries (R, query heads, key_dim), and keep the
        keys and values (R, heads, dim).
        """
        found = query.new_zeros((*query.shape[:2], value.shape[2]))
        count = len(self._decoded)
        if count:
            states = [each.states for each in self._decoded]
            append_tokens(states, layer, key[:count], value[:count])
            found[:count] = attend(
                query[:count], states, layer, kind.scale, softcap=kind.softcap, window=kind.window
            )
        start = count
        for each in self._passes:
            end = start + len(each.ids)
            try:
                found[start:end] = self._pass(
                    each, layer, query[start:end], key[start:end], value[start:end], kind
                )
            except Exception as error:
                each.failure = each.failure or error
            start = end
        return found

    def close(self) -> None:
        """Wait for a read that is still under way."""
        if self._next is not None:
            with contextlib.suppress(Exception):
                self._next[2].result()
            self._next = None

    def _pass(
        self,
        rows: Rows,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kind: AttentionKind,
    ) -> Tensor:
        pages = rows.originals.pages if rows.originals else 0
        buffers = self._wait_for(layer, rows) if pages else None  # of one that failed, too: in turn
        if rows.failure is not None:
            return query.new_zeros((*query.shape[:2], value.shape[2]))
        states = rows.states
        if buffers is not None:
            keys, values = assemble(buffers, pages, states, layer, (key, value))
        elif rows.start:
            keys, values = map(torch.cat, zip(states.read(layer), (key, value), strict=True))
        else:
            keys, values = key, value
        seen = len(query), len(keys), kind
        if seen not in self._masks:
            self._masks[seen] = causal_mask(query, len(keys), keys.shape[1], kind)
        found = attend_causal(query, keys, values, kind, self._masks[seen])
        if not rows.settles:
            append_rows(states, layer, key, value)
        elif rows.originals is None:
            states.fill(layer, key, value)
        else:
            states.fill(layer, key, value, on_page=rows.originals.write)
        return found

    def _wait_for(self, layer: int, rows: Rows) -> list[Tensor] | None:
        assert self._next is not None
        expected_layer, expected_rows, future = self._next
        assert expected_layer == layer and expected_rows is rows, "layers come in their order"
        try:
            return future.result()
        except Exception as error:
            rows.failure = rows.failure or error
            return None
        finally:
            self._read_ahead()

    def _read_ahead(self) -> None:
        following = next(self._reads, None)
        if following is None:
            self._next = None
            return
        layer, rows = following
        assert rows.originals is not None
        originals, buffers = rows.originals, self._slot.take()

        def read() -> list[Tensor]:
            keys, values = (pages_of(buffer, originals.pages) for buffer in buffers)
            originals.read(layer, originals.pages, keys, values)
            return buffers

        self._next = (layer, rows, self._reader.submit(read))


def causal_mask(query: Tensor, length: int, heads: int, kind: AttentionKind) -> Tensor | None:
    """Return what is added to the scores of a text's last tokens, whose queries are (T, query
    heads, key_dim): (T, length), or as ``attend_causal`` folds them. None: nothing, or for all of a
    text what is_causal means.
    """
    count, groups = len(query), query.shape[1] // heads
    if kind.window is None and (count == 1 or (count == length and kind.softcap is None)):
        return None
    places_K = torch.arange(length, device=query.device)
    places_T1 = torch.arange(length - count, length, device=query.device)[:, None]
    seen = places_K <= places_T1
    if kind.window is not None:
        seen &= places_K > places_T1 - kind.window
    mask = query.new_zeros(count, length).masked_fill_(~seen, -torch.inf)
    return mask.repeat(groups, 1) if _folds(count, kind) else mask


def attend_causal(
    query: Tensor, keys: Tensor, values: Tensor, kind: AttentionKind, mask: Tensor | None
) -> Tensor:
    """Return the attention of the last tokens of a text: queries (T, query heads, key_dim), keys
    and values (tokens, heads, dim) of all of it, ``mask`` as ``causal_mask`` makes it.

    Few queries that share a head are folded into rows of one: keys and values are read once.
    """
    count, heads = len(query), keys.shape[1]
    q, k, v = (states.transpose(0, 1)[None] for states in (query, keys, values))
    if kind.softcap is not None:
        q = q.reshape(heads, -1, *q.shape[2:])
        scores = q @ k[0][:, None].transpose(-1, -2) * (kind.scale / kind.softcap)
        scores = torch.tanh(scores) * kind.softcap
        weights = (scores if mask is None else scores + mask).softmax(-1, dtype=torch.float32)
        found = weights.to(v.dtype) @ v[0][:, None]
    else:
        if mask is not None and _folds(count, kind):
            q = q.reshape(1, heads, -1, q.shape[-1])
        found = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None and count > 1,
            scale=kind.scale,
            enable_gqa=q.shape[1] > heads,
        )
    return found.reshape(query.shape[1], count, -1).transpose(0, 1)


def _folds(count: int, kind: AttentionKind) -> bool:
    return count <= _FEW_ROWS and kind.softcap is None


_current: ContextVar["Callable[..., Tensor] | None"] = ContextVar("_current", default=None)


@contextlib.contextmanager
def attending(attend_layer: Callable[..., Tensor]) -> Iterator[None]:
    """Have forwards of this thread attend by ``attend_layer(layer, query, key, value, kind)``."""
    token = _current.set(attend_layer)
    try:
        yield
    finally:
        _current.reset(token)


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers asks: (1, heads, R, dim) each; returns (1, R, heads, value_dim)."""
    attend_layer = _current.get()
    unknown = [name for name in _UNKNOWN if others.get(name) is not None]
    if unknown:
        raise InputError(f"attention with {unknown[0]} can't be served by request")
    if attention_mask is not None:
        raise InputError("attention with a mask of the model's own can't be served by request")
    if attend_layer is None:
        raise InputError("the model is being served: close the engine before using it otherwise")
    kind = AttentionKind(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap,
        window=sliding_window,
    )
    found = attend_layer(
        module.layer_idx, *(states[0].transpose(0, 1) for states in (query, key, value)), kind
    )
    return found[None], None


def register() -> None:
    """Make the attention function known to transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention_function)
