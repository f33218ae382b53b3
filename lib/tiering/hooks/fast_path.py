"""torch's fast path for encoders, which it takes by what it finds of weights and hooks.

``nn.TransformerEncoderLayer`` computes with all its weights at once where they are plain and none
of its modules has hooks; ``nn.TransformerEncoder`` drops padded positions where its first layer's
weights are plain, and ``nn.MultiheadAttention`` has a path of its own. The other paths give other
bits, and other values at padded positions. So these modules run with plain weights.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..residency.stand_ins import OffloadedParameter
from .calls import Calls, Context


@contextlib.contextmanager
def plain_weights(module: nn.Module, *, trains: bool) -> Iterator[None]:
    """Make a module's weights plain ones for as long as it runs, also those held compressed.

    ``trains``: some weights of the model have been trainable, so that torch would take the slow
    path where gradients are recorded.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    with contextlib.ExitStack() as stack:
        for parameter in module.parameters():
            if isinstance(parameter, OffloadedParameter):
                stack.enter_context(parameter._tierhints_away.fetch())
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        if trains and torch.is_grad_enabled():
            torch.backends.mha.set_fastpath_enabled(False)
        yield


class EncoderPaths:
    """The encoders, their layers and attention modules of a model. A layer's weights are held by
    ``hold``; the first layer's also while its encoder looks at them.
    """

    def __init__(self, calls: Calls, *, trains: bool) -> None:
        self._calls = calls
        self._trains = trains
        self._holds: dict[nn.Module, Context] = {}
        self._early: dict[nn.Module, contextlib.ExitStack] = {}

    def add_layer(self, module: nn.Module, hold: Context) -> None:
        """Hold a layer's weights while it runs."""

        @contextlib.contextmanager
        def held(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
            with hold(args, kwargs), plain_weights(module, trains=self._trains):
                yield

        @contextlib.contextmanager
        def context(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
            early = self._early.pop(module, None)
            with held(args, kwargs) if early is None else early.pop_all():
                yield

        self._holds[module] = held
        self._calls.run_within(module, context)

    def add_others(self, model: nn.Module) -> None:
        """Take care of the encoders, and of attention wherever it is."""
        for module in model.modules():
            if isinstance(module, nn.MultiheadAttention):
                self._calls.run_within(module, self._attention(module))
            elif isinstance(module, nn.TransformerEncoder):
                self._calls.run_within(module, self._encoder(module))

    def _attention(self, module: nn.Module) -> Context:
        return lambda args, kwargs: plain_weights(module, trains=self._trains)

    def _encoder(self, module: nn.TransformerEncoder) -> Context:
        @contextlib.contextmanager
        def context(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
            with contextlib.ExitStack() as stack:
                for first in module.layers[:1]:
                    if first in self._holds:
                        stack.enter_context(self._holds[first](args, kwargs))
                        self._early[first] = stack
                        stack.callback(self._early.pop, first, None)
                yield

        return context
