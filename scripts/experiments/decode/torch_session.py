"""Sessions of models that torch computes: plain, attached, or quantized by torchao.

Eager decoding has the growing cache that ``generate`` takes by default; compiled decoding has a
static one, as ``generate(cache_implementation="static")``. Prompts are computed eagerly in both.
"""

import copy
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from scripts.experiments.decode.peers.base import COMPILED, WARM_UP_STEPS, Session, Sizes


class TorchSession(Session):
    """A causal language model of transformers, in evaluation mode."""

    def __init__(
        self, model: Any, sizes: Sizes, compile: Callable[[Any], Any] = torch.compile
    ) -> None:
        """Have a model; ``compile`` returns what makes its steps."""
        self.sizes = sizes
        self._model = model
        self._compile = compile
        self._compiled: Any = None
        self._decoders: dict[str, Decoder] = {}

    @torch.no_grad()
    def prepare(self, mode: str, ids_BT: NDArray[np.int64], steps: int) -> None:
        self._decoders.pop(mode, None)
        compiled = mode == COMPILED
        if compiled and self._compiled is None:
            self._compiled = self._compile(self._model)
        decoder = Decoder(
            self._model,
            torch.from_numpy(ids_BT),
            step=self._compiled if compiled else self._model,
            room=steps if compiled else None,
        )
        decoder.run(WARM_UP_STEPS)
        self._decoders[mode] = decoder

    @torch.no_grad()
    def decode(self, mode: str, steps: int) -> list[float]:
        return self._decoders[mode].run(steps)[WARM_UP_STEPS:]

    @torch.no_grad()
    def prefill(self, ids_T: NDArray[np.int64]) -> float:
        ids_1T = torch.from_numpy(ids_T)[None]
        begin = time.perf_counter()
        self._model(input_ids=ids_1T, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - begin

    @torch.no_grad()
    def logits(self, ids_T: NDArray[np.int64]) -> NDArray[np.float32]:
        output = self._model(input_ids=torch.from_numpy(ids_T)[None], use_cache=False)
        logits_TV: Tensor = output.logits[0]
        found: NDArray[np.float32] = logits_TV.float().numpy()
        return found


class Decoder:
    """Decodes after one context, over and over. ``room``: a static cache for so many tokens."""

    def __init__(
        self, model: Any, ids_BT: Tensor, *, step: Callable[..., Any], room: int | None
    ) -> None:
        from transformers import DynamicCache, StaticCache

        self._step = step
        self._num_context = ids_BT.shape[1]
        self._static = room is not None
        self._cache: Any = (
            DynamicCache(config=model.config)
            if room is None
            else StaticCache(config=model.config, max_cache_len=self._num_context + room)
        )
        output = model(
            input_ids=ids_BT, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        self._first_B1 = output.logits[:, -1:].argmax(-1)

    def run(self, steps: int) -> list[float]:
        """Take greedy steps from the context on; return the seconds of each."""
        cache = self._cache
        if self._static:
            for layer in cache.layers:
                layer.cumulative_length.fill_(self._num_context)
        else:
            cache = copy.deepcopy(cache)
        ids_B1, seconds = self._first_B1, []
        for _ in range(steps):
            begin = time.perf_counter()
            output = self._step(input_ids=ids_B1, past_key_values=cache, use_cache=True)
            ids_B1 = output.logits[:, -1:].argmax(-1)
            seconds.append(time.perf_counter() - begin)
        return seconds


def lookups(model: Any) -> set[nn.Embedding]:
    """Return the embeddings of which a step takes rows only: those that aren't the head, too."""
    head = model.get_output_embeddings()
    return {
        module
        for module in model.modules()
        if isinstance(module, nn.Embedding) and (head is None or module.weight is not head.weight)
    }


def measure_sizes(model: Any) -> Sizes:
    """Return the bytes of a model's matrices, those of torchao's tensors by their parts."""
    matrices = {id(weight): weight for weight in model.parameters() if weight.dim() > 1}
    held = sum(map(tensor_bytes, matrices.values()))
    looked_up = {id(module.weight): module.weight for module in lookups(model)}
    return Sizes(
        held_bytes=held,
        read_bytes=held - sum(map(tensor_bytes, looked_up.values())),
    )


def tensor_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor, or of the tensors that a wrapper is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(map(tensor_bytes, (getattr(tensor, name) for name in names)))
