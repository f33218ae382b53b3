"""A request for text, and the events that answer it: what the engine and its callers exchange."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from torch import Tensor

from .bounds import Quality, QualityBound

Constraint = Callable[[Sequence[int]], Tensor]
"""New tokens so far to a mask (V,), bool, of those that may come next: a grammar's, say. It has no
state: drafted tokens are asked about, and taken back.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a token is chosen from the model's distribution.

    At a temperature above 0 it is the largest after Gumbel noise, which depends on seed and place
    alone (verify.py): so the same seed gives the same text, whatever shares the batch.
    """

    temperature: float = 0.0
    """0: the most likely token."""
    top_p: float = 1.0
    seed: int = 0
    constraint: Constraint | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """A text to go on with."""

    prompt: Sequence[int]
    """Token ids, at least one."""
    max_new_tokens: int
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end the text; they are not part of it."""
    sampling: Sampling = field(default_factory=Sampling)
    bound: QualityBound | None = None
    """None: full precision."""
    top_logprobs: int = 0
    """Alternatives to say of each token."""
    deadline: float | None = None
    """time.monotonic() by which it has to be done, else it is ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One released token: it stays."""

    id: int
    logprob: float
    """By the model, before temperature and top_p."""
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens and their log-probabilities, first the largest."""


class Finish(StrEnum):
    """Why a text ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The last event of a request that was answered."""

    finish: Finish
    prompt_tokens: int
    new_tokens: int
    rejected_tokens: int
    """Drafted, and taken back."""
    accepted_tokens: int = 0
    """Drafted, checked, and taken: tokens of the answer, and its end."""
    cached_tokens: int = 0
    """Of the prompt, that an earlier request had computed."""
    quality: Quality


Event = tuple[Token, ...] | Outcome | Exception
"""Tokens as they are released, then an Outcome; or what went wrong, which is then the last."""
