"""Room for the originals: weights that are held compressed must be somewhere, or detach could not
give them back. A checkpoint has them; others are written to the SSD tier, and count against it.
"""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import nn

from ..blocks import unique_parameters
from ..errors import InputError
from ..hints import Tier
from ..policy.plan import Plan
from ..units import format_bytes
from .payload import Payload, make_payload


def original_bytes(model: nn.Module, payloads: Iterable[Payload]) -> int:
    """Return the bytes that the originals of compressed groups take in a store."""
    shapes = dict(unique_parameters(model))
    return sum(
        make_payload(payload.group, model, shapes, None).num_bytes
        for payload in payloads
        if payload.lossy
    )


def leave_room(budget: Mapping[Tier, int | None], num_bytes: int) -> dict[Tier, int | None]:
    """Return what is left of a budget beside the originals.

    Raises InputError where it has no SSD, or a smaller one than they need.
    """
    left = dict(budget)
    if not num_bytes:
        return left
    size = format_bytes(num_bytes)
    if Tier.SSD not in left:
        raise InputError(
            f"compressed weights need a place for the originals ({size}), which detach gives back: "
            "name SSD in the budget, or give the checkpoint as weights="
        )
    limit = left[Tier.SSD]
    if limit is not None:
        if limit < num_bytes:
            raise InputError(
                f"budget SSD={format_bytes(limit)} is too small for the originals of compressed "
                f"weights, which detach gives back: give at least {size}, or the checkpoint as "
                "weights="
            )
        left[Tier.SSD] = limit - num_bytes
    return left


def with_originals(plan: Plan, budget: Mapping[Tier, int | None], num_bytes: int) -> Plan:
    """Return a plan with the whole budget and the originals in it."""
    return replace(plan, budget=dict(budget), original_bytes=num_bytes)


def warn_of_incompressible(payloads: Iterable[Payload]) -> None:
    """Say what stays as it is although it was to be compressed."""
    parts = [part for payload in payloads for part in payload.parts if part.incompressible]
    if parts:
        warnings.warn(
            f"{format_bytes(sum(part.num_bytes for part in parts))} of weights stay as they are, "
            f"such as {parts[0].parameter!r}: compressed they would not be smaller",
            stacklevel=3,
        )
