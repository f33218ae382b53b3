"""A model that is served: whether it can be, what a token leaves in its cache, and its steps."""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .batch import NAME, AttentionKind, Batch, Rows, Slot, attending, register
from .bounds import RequestError
from .generation import GenerationRequest
from .ladder import KvShape
from .requests import fixed_positions, why_unfit
from .verify import Scored, score

_PROBED = 4
"""Tokens that tell how a model attends; one alone needs no mask."""


class ServedModel:
    """A model of transformers whose attention is ours until it is given back.

    ``context``: tokens that a text may have; default and most: what the model was made for. Raises
    InputError, naming the class, for a model that can't be served by request.
    """

    def __init__(self, model: Any, context: int | None = None) -> None:
        check_can_serve(model)
        register()
        config = model.config.get_text_config(decoder=True)
        self.context = min(filter(None, (context, config.max_position_embeddings)))
        check_positions(config, self.context)
        self.vocabulary: int = config.vocab_size
        self.dtype: torch.dtype = model.dtype
        self._model = model
        self._attention = model.config._attn_implementation
        self._training = model.training
        model.eval()
        model.set_attn_implementation(NAME)
        try:
            self.shape = find_shape(model)
            self.slot = Slot(self.shape, self.context, model.dtype)
        except BaseException:
            self.give_back()
            raise
        self._reader = ThreadPoolExecutor(1, "originals")

    def run(self, rows: Sequence[Rows]) -> list[Scored]:
        """Compute a step, decoded tokens first; return each request's kept logits."""
        device = self._model.device
        ids = torch.tensor([[token for each in rows for token in each.ids]], device=device)
        places = [range(each.start, each.start + len(each.ids)) for each in rows]
        positions = torch.tensor([[place for each in places for place in each]], device=device)
        kept: list[int] = []
        start = 0
        for each in rows:
            start += len(each.ids)
            kept.extend(range(start - each.kept, start))
        batch = Batch(rows, self.shape, self.slot, self._reader)
        try:
            with attending(batch.attend):
                output = self._model(
                    input_ids=ids,
                    position_ids=positions,
                    use_cache=False,
                    return_dict=True,
                    logits_to_keep=torch.tensor(kept, dtype=torch.long, device=device),
                )
        finally:
            batch.close()
        return score(output.logits[0], [each.kept for each in rows])

    def check(self, request: GenerationRequest) -> None:
        """Raise RequestError for a request that this model can't answer."""
        tokens = len(request.prompt) + request.max_new_tokens
        if not request.prompt:
            raise RequestError("the prompt has no tokens: give some text", param="prompt")
        if request.max_new_tokens < 1:
            raise RequestError(
                f"max_new_tokens is {request.max_new_tokens}: give 1 or more", param="max_tokens"
            )
        wrong = next((each for each in request.prompt if not 0 <= each < self.vocabulary), None)
        if wrong is not None:
            raise RequestError(
                f"token {wrong} of the prompt: the model has 0 to {self.vocabulary - 1}",
                param="prompt",
            )
        sampling = request.sampling
        if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
            raise RequestError(
                f"temperature is {sampling.temperature}: give 0 (greedy) or more",
                param="temperature",
            )
        if not 0 < sampling.top_p <= 1:
            raise RequestError(
                f"top_p is {sampling.top_p}: give above 0, and at most 1", param="top_p"
            )
        if tokens > self.context:
            raise RequestError(
                f"{len(request.prompt)} tokens of prompt and {request.max_new_tokens} new ones are "
                f"more than the context of {self.context}: shorten the prompt, or ask for fewer",
                param="messages",
                code="context_length_exceeded",
            )

    def give_back(self) -> None:
        """Leave the model as it was given."""
        self._model.set_attn_implementation(self._attention)
        self._model.train(self._training)

    def close(self) -> None:
        """Stop reading ahead, and give the model back."""
        self._reader.shutdown()
        self.give_back()


def check_can_serve(model: Any) -> None:
    """Raise InputError, naming the class, for a model that can't be served by request."""
    reason = why_unfit(model, {"position_ids", "logits_to_keep"})
    if reason is None and not getattr(model, "_supports_attention_backend", False):
        reason = "its attention isn't on transformers' attention interface"
    elif reason is None and _chunk_size(model):
        reason = "its attention goes by more than causal order and a window"
    elif reason is None and model.device.type != "cpu":
        reason = f"it is on {model.device}, and states of requests are in the host's memory so far"
    if reason is not None:
        raise InputError(f"a {type(model).__name__} can't be served: {reason}")


def _chunk_size(model: Any) -> int | None:
    size: int | None = getattr(
        model.config.get_text_config(decoder=True), "attention_chunk_size", None
    )
    return size


def check_positions(config: Any, context: int) -> None:
    """Raise InputError where a text of ``context`` tokens would change the rotary embeddings of
    other texts in its batch.
    """
    limit, kind = fixed_positions(config)
    if limit is not None and context > limit:
        raise InputError(
            f"positions beyond {limit} change what this model's rotary embeddings ({kind}) say of "
            f"all texts in a batch, and the context is {context}: give a context of at most {limit}"
        )


def find_shape(model: Any) -> KvShape:
    """Return what a token leaves in a model's cache, by a forward of a few.

    Raises InputError for models whose layers don't all attend alike.
    """
    seen: dict[int, tuple[int, int, int]] = {}
    itemsize = 0

    def look(layer: int, query: Tensor, key: Tensor, value: Tensor, kind: AttentionKind) -> Tensor:
        nonlocal itemsize
        if layer in seen:
            raise InputError(f"layer {layer} attends twice: its state can't be kept by request")
        seen[layer] = (key.shape[1], key.shape[2], value.shape[2])
        itemsize = key.element_size()
        return query.new_zeros((*query.shape[:2], value.shape[2]))

    device = next(model.parameters()).device
    ids = torch.zeros(1, _PROBED, dtype=torch.long, device=device)
    with torch.inference_mode(), attending(look):
        model(
            input_ids=ids, position_ids=torch.arange(_PROBED, device=device)[None], use_cache=False
        )
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    if sorted(seen) != list(range(layers)) or len(set(seen.values())) != 1:
        raise InputError(
            f"a {type(model).__name__} has {layers} layers, of which {len(seen)} attend, with "
            f"{len(set(seen.values()))} shapes of keys and values: each must, in one shape"
        )
    heads, key_dim, value_dim = seen[0]
    return KvShape(
        layers=layers, heads=heads, key_dim=key_dim, value_dim=value_dim, itemsize=itemsize
    )
