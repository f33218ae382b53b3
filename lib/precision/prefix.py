"""Forward passes that begin where a change of weights begins.

A change in layer l leaves everything before that layer as it was. ``ResumableForward`` keeps what
each layer gave for one batch of tokens, and computes logits anew from a layer on: the layers before
it are replaced, for one pass, by what they gave. The same operations see the same numbers, so the
logits are those of a whole pass bit for bit.

That needs layers which are called one after another, each once, with the output of the one before
as their input, and nothing else passing between them. Whether a model is such is seen from a pass,
not from its name, and checked by comparing bits; of any other every pass is a whole one.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import Block, partition_model, unwrap_model
from ..signals.summary import causal_logits


class ResumableForward:
    """Logits of a causal language model whose weights change here and there between passes.

    Holds the outputs of all layers for one batch: layers * B * T * width numbers.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._inner = unwrap_model(model)
        self._blocks = {block.name: block for block in partition_model(model)}
        self._layers: list[nn.Module] | None = None
        self._starts: dict[str, int] = {}
        self._outputs: list[Any] = []
        self._ids_BT: Tensor | None = None
        self._checked = False

    @property
    def resumes(self) -> bool:
        """Whether passes begin at a layer; known after the first ``record``."""
        return bool(self._layers)

    @torch.inference_mode()
    def record(self, ids_BT: Tensor) -> Tensor:
        """Run a whole pass, keep what layers give, and return its logits (B, T, V)."""
        self._ids_BT = ids_BT
        if self._layers is None:
            logits_BTV = self._find_layers(ids_BT)
        else:
            with ExitStack() as stack:
                self._outputs = [None] * len(self._layers)
                for index, layer in enumerate(self._layers):
                    stack.enter_context(_hooked(layer, after=self._keep(index)))
                logits_BTV = causal_logits(self._model, ids_BT)
        if self._layers and not self._checked:
            self._checked = True
            if not self._resumes_exactly(logits_BTV):
                self._layers, self._outputs = [], []
        return logits_BTV

    @torch.inference_mode()
    def logits(self, changed: Iterable[str]) -> Tensor:
        """Return the logits of the recorded batch, now that these blocks' weights have changed."""
        assert self._ids_BT is not None, "record a batch first"
        start = min((self._starts.get(name, 0) for name in changed), default=0)
        if not self._layers or not start:
            return causal_logits(self._model, self._ids_BT)
        return self._resume(start)

    def _resumes_exactly(self, logits_BTV: Tensor) -> bool:
        """Say whether passes that begin halfway, and behind the last layer, give the same bits."""
        assert self._layers
        try:
            again = [self._resume(start) for start in (len(self._layers) // 2, len(self._layers))]
        except Exception:  # whatever layers miss that got nothing from those before them
            return False
        return all(torch.equal(logits, logits_BTV) for logits in again)

    def _resume(self, start: int) -> Tensor:
        """Run a pass whose first ``start`` layers give what they gave before."""
        assert self._layers is not None and self._ids_BT is not None
        given = self._outputs[start - 1]
        with ExitStack() as stack:
            for layer in self._layers[:start]:
                stack.enter_context(_replaced_forward(layer, lambda *args, **kwargs: given))
            return causal_logits(self._model, self._ids_BT)

    def _keep(self, index: int) -> Callable[[Any], None]:
        def keep(output: Any) -> None:
            self._outputs[index] = output

        return keep

    def _find_layers(self, ids_BT: Tensor) -> Tensor:
        """Run a pass and see from it which layers follow each other, and where blocks begin."""
        chains = [_Chain(list(layers)) for layers in _outermost_lists(self._inner)]
        first_calls: dict[str, list[int]] = {}
        with ExitStack() as stack:
            for chain in chains:
                for index, layer in enumerate(chain.layers):
                    stack.enter_context(
                        _hooked(layer, before=chain.enter(index), after=chain.leave(index))
                    )
            for name in {name for block in self._blocks.values() for name in block.modules}:

                def note(inputs: Any, name: str = name) -> None:
                    first_calls.setdefault(name, [chain.done for chain in chains])

                stack.enter_context(_hooked(self._inner.get_submodule(name), before=note))
            logits_BTV = causal_logits(self._model, ids_BT)
        usable = [index for index, chain in enumerate(chains) if chain.is_sound]
        best = max(usable, key=lambda index: len(chains[index].layers), default=None)
        if best is None:
            self._layers = []
            return logits_BTV
        self._layers, self._outputs = chains[best].layers, chains[best].outputs
        for name, block in self._blocks.items():
            self._starts[name] = self._start_of(block, first_calls, best)
        return logits_BTV

    def _start_of(self, block: Block, first_calls: dict[str, list[int]], chain: int) -> int:
        """Return the number of layers that were done when the block's weights were first used; 0
        where a pass doesn't tell.
        """
        if not all(name in first_calls for name in block.modules):
            return 0
        return min(first_calls[name][chain] for name in block.modules)


class _Chain:
    """What a pass shows of a list of modules."""

    def __init__(self, layers: list[nn.Module]) -> None:
        self.layers = layers
        self.outputs: list[Any] = []
        self.done = 0
        self._broken = False

    @property
    def is_sound(self) -> bool:
        return not self._broken and self.done == len(self.layers)

    def enter(self, index: int) -> Callable[[Any], None]:
        def note(inputs: Any) -> None:
            if index != self.done or index != len(self.outputs):
                self._broken = True
            elif index and _hidden(self.outputs[-1]) is not inputs:
                self._broken = True

        return note

    def leave(self, index: int) -> Callable[[Any], None]:
        def note(output: Any) -> None:
            self.done += 1
            self.outputs.append(output)

        return note


def _hidden(output: Any) -> Any:
    """Return the hidden states in a layer's output: itself, or the first of a tuple."""
    return output[0] if isinstance(output, tuple) and output else output


def _outermost_lists(model: nn.Module) -> Iterator[nn.ModuleList]:
    """Yield the lists of modules that aren't inside another's elements."""
    for child in model.children():
        if isinstance(child, nn.ModuleList) and len(child) > 1:
            yield child
        else:
            yield from _outermost_lists(child)


@contextmanager
def _hooked(
    module: nn.Module,
    *,
    before: Callable[[Any], None] | None = None,
    after: Callable[[Any], None] | None = None,
) -> Iterator[None]:
    """Call ``before`` with the module's first input, and ``after`` with its output."""
    handles = []
    if before is not None:

        def on_call(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            before(args[0] if args else kwargs.get("hidden_states"))

        handles.append(module.register_forward_pre_hook(on_call, with_kwargs=True))
    if after is not None:

        def on_return(_: nn.Module, args: Any, output: Any) -> None:
            after(output)

        handles.append(module.register_forward_hook(on_return))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    own = module.__dict__.get("forward")  # an instance's own is a wrapper's
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own
