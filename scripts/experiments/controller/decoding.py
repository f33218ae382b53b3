"""Decoding of given text: held-out tokens are fed one by one after a prompt, and timed."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lib.errors import InputError
from lib.text.held_out import read_text
from lib.text.parts import vocabulary_size
from lib.tiering import Runtime


@dataclass(slots=True, kw_only=True)
class Given:
    """What is decoded: tokens (N, T), of which so many are each row's prompt; seconds are of
    ``clock``, the wall's or the thread's own.
    """

    tokens: Tensor
    prompt_tokens: int
    clock: Callable[[], float]

    @property
    def num_decoded(self) -> int:
        """Tokens that are fed one by one."""
        rows, length = self.tokens.shape
        return int(rows * (length - self.prompt_tokens))


@dataclass(slots=True, kw_only=True)
class Decoded:
    """Seconds of the decode steps, computing and charged, and the logits (steps, vocabulary)."""

    seconds: float
    stall_seconds: float
    logits: Tensor


def read_given(
    model: Any,
    path: str,
    *,
    sequences: int,
    prompt_tokens: int,
    cpu_time: bool = False,
) -> Given:
    """Return held-out text of a checkpoint. ``cpu_time``: on a machine that others use too."""
    text = read_text(
        path,
        None,
        vocab_size=vocabulary_size(model),
        length=int(model.config.max_position_embeddings),
        count=sequences,
        seed=0,
    )
    if text.tokens.shape[1] <= prompt_tokens:
        raise InputError(
            f"the text has {text.tokens.shape[1]} tokens per row, and the prompt is "
            f"{prompt_tokens}: give a shorter one"
        )
    clock = time.thread_time if cpu_time else time.perf_counter
    return Given(tokens=text.tokens, prompt_tokens=prompt_tokens, clock=clock)


def decode(model: Any, given: Given, runtime: Runtime | None = None) -> Decoded:
    """Feed each row's prompt, then its tokens one by one; only the latter are timed."""
    seconds = stalled = 0.0
    logits = []
    with torch.no_grad():
        for row in given.tokens:
            cache = model(input_ids=row[None, : given.prompt_tokens], use_cache=True)
            cache = cache.past_key_values
            began, charged = given.clock(), _stall(runtime)
            for place in range(given.prompt_tokens, len(row)):
                step = model(
                    input_ids=row[None, place : place + 1], past_key_values=cache, use_cache=True
                )
                logits.append(step.logits[0, -1])
            waited = _stall(runtime) - charged
            stalled += waited
            seconds += given.clock() - began
            if runtime is not None and runtime.mode == "emulated":
                seconds += waited
    return Decoded(seconds=seconds, stall_seconds=stalled, logits=torch.stack(logits))


def _stall(runtime: Runtime | None) -> float:
    if runtime is None:
        return 0.0
    if runtime.mode == "emulated":
        return runtime.virtual_seconds
    return runtime.stats().transfer_seconds
