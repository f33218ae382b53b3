"""What an endpoint is set to, and what it knows of its model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..progressive.bounds import QualityBound
from ..units import MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What requests and replies need of the model, its weights apart."""

    name: str
    """What requests call it."""
    vocab_size: int
    """The length of a row of its logits."""
    stop_ids: frozenset[int]
    """Tokens that end a text."""
    chat: bool = True
    """Whether it has a chat template."""
    temperature: float = 0.0
    """Where a request has none."""
    top_p: float = 1.0
    """Where a request has none."""
    response_template: Mapping[str, Any] | None = None
    """How transformers reads tool calls out of its text; None: it has no form of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Who may ask, and what is too much whatever is asked."""

    api_key: str | None = field(default=None, repr=False)
    """None: nobody needs one."""
    max_body_bytes: int = 2 * MIB
    max_seconds: float = 600.0
    """From a request's arrival to its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(Access):
    """What an endpoint is set to."""

    model: ModelCard
    default_bound: QualityBound | None = None
    """Of requests without a quality_bound; None: full precision."""
    max_new_tokens: int = 4096
    max_choices: int = 8
    """Prompts times n of one request."""
    retry_seconds: int = 2
    """What a client is told to wait where the queue is full."""
