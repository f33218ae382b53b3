"""The keys and values of one request in fast memory.

Of each layer's tokens

    sinks (full) | pages (at the tier) | tail (full)

``settle`` makes pages of what has become whole ones (``ladder.num_pages``); the tail, in blocks of
``BLOCK_TOKENS`` that never move, is what may still be taken back or replaced. Sinks and blocks hold
a token's key and value side by side: (heads, tokens, key_dim + value_dim). A page is two tensors,
one of keys and one of values, rows by head and then by token.

    states = RequestStates(shape, tier)
    for layer ...: states.fill(layer, keys, values)    # a prompt's piece
    for layer ...: states.append(layer, keys, values)  # drafted tokens, ...
    states.crop(length)                                # ... and taken back
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ...errors import InputError
from ..ladder import KvShape, KvTier
from .formats import layer_formats
from .layer_states import LayerStates, settle_layers

OnPage = Callable[[int, int, Tensor, Tensor], None]
"""Is told a layer, a page's index, and the keys and values (PAGE_TOKENS, heads, dim) that the page
is made of.
"""


def _keep_nothing(layer: int, page: int, keys: Tensor, values: Tensor) -> None:
    """Leave the originals away."""


class RequestStates:
    """Keys and values of one request, all layers, in fast memory.

    Tensors given and returned are on ``device`` and in ``dtype``; their memory isn't kept.
    """

    def __init__(
        self,
        shape: KvShape,
        tier: KvTier,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        assert shape.itemsize == dtype.itemsize, "the shape is of another dtype"
        self.shape = shape
        self.tier = tier
        self.dtype = dtype
        self.layers = [
            LayerStates(shape, layer_formats(shape, tier, layer, dtype), torch.device(device))
            for layer in range(shape.layers)
        ]

    @property
    def length(self) -> int:
        """Tokens that all layers have."""
        return min(layer.length for layer in self.layers)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors: after ``settle``, ``tier.num_bytes(shape, length)``."""
        return sum(layer.num_bytes for layer in self.layers)

    @property
    def errors(self) -> list[tuple[float, float]]:
        """Of each layer the sums of squared errors of its pages against the states that they were
        made of: keys', values'. Upper bounds once pages were demoted.
        """
        return [(layer.errors[0], layer.errors[1]) for layer in self.layers]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Add tokens (T, heads, dim) to a layer's tail."""
        self.layers[layer].append(keys, values)

    def fill(
        self, layer: int, keys: Tensor, values: Tensor, *, on_page: OnPage = _keep_nothing
    ) -> None:
        """Add tokens (T, heads, dim) to a layer, however many, and make pages on the way: a piece
        of a prompt is never in full here but for its tail. What is in pages can't be taken back.
        """
        self.layers[layer].fill(keys, values, functools.partial(on_page, layer))

    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens of all layers: their room is free once they settle.

        Raises InputError where pages go on.
        """
        first_open = max(layer.first_open for layer in self.layers)
        if length < first_open:
            told = f"tokens from {length} on can't be taken back"
            raise InputError(f"{told}: those before {first_open} are in pages")
        for layer in self.layers:
            layer.resize(min(layer.length, length))

    def settle(
        self,
        layer: int | None = None,
        *,
        length: int | None = None,
        on_page: OnPage = _keep_nothing,
    ) -> None:
        """Make pages of a layer's whole ones, or of all layers': they can't be taken back.

        ``length``: only the first tokens count; default: all. ``on_page`` may keep the originals.
        """
        indices = range(self.shape.layers) if layer is None else (layer,)
        layers = [self.layers[index] for index in indices]  # alike, between two steps
        length = layers[0].length if length is None else length
        if layers[0].can_settle(length):
            settle_layers(layers, length, [functools.partial(on_page, each) for each in indices])

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values, (length, heads, dim), as they are attended to."""
        keys, values = self.layers[layer].read()
        return keys.transpose(0, 1), values.transpose(0, 1)

    def rebuild(self, layer: int, tier: KvTier, keys: Tensor, values: Tensor) -> None:
        """Make a layer's pages anew at another tier, from the originals (T, heads, dim) of all of
        their tokens: those from ``SINK_TOKENS`` on. ``tier`` is the new one from the first on.
        """
        formats = layer_formats(self.shape, tier, layer, self.dtype)
        self.layers[layer].rebuild(formats, keys, values)
        self.tier = tier

    def demote(self, tier: KvTier) -> None:
        """Turn all pages into those of a lower tier, without originals: by dropping planes where
        its codes are a prefix, by encoding anew elsewhere.

        Raises InputError, before anything is changed, for a tier that is more precise somewhere.
        """
        formats = []
        for index, layer in enumerate(self.layers):
            keys, values = layer.formats
            wanted = layer_formats(self.shape, tier, index, self.dtype)
            formats.append((keys.lowered(wanted[0].precision), values.lowered(wanted[1].precision)))
        for layer, lowered in zip(self.layers, formats, strict=True):
            layer.demote(lowered)
        self.tier = tier
