"""Hints in memory: what the file says of the model and of each block."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..vocabulary import Precision, Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockHint:
    """What the file says of one block. A flat file knows the tier alone: the other fields are then
    None or empty. ``signals`` of experts may have ``router_counts``, times that a token was routed
    to the block.
    """

    tier: Tier
    importance: float | None = None
    rank: int | None = None
    num_bytes: int | None = None
    num_params: int | None = None
    signals: Mapping[str, float | Sequence[float]] = field(default_factory=dict)
    reason: str = ""
    kl: Mapping[Precision, float] = field(default_factory=dict)
    floor: Precision | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """The identity of the model that the hints were made for."""

    id: str
    revision: str
    class_name: str
    parameter_digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Hints:
    """A whole hints file; ``model`` is None for the flat form."""

    blocks: Mapping[str, BlockHint]
    model: ModelInfo | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    quality: Mapping[str, Any] = field(default_factory=dict)
