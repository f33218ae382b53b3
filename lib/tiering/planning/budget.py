"""Room for the originals: weights that are held compressed must be somewhere, or detach could not
give them back. A checkpoint has them; others are written to the SSD tier, and count against it.
"""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ...blocks import unique_parameters
from ...errors import InputError
from ...policy.plan import Plan
from ...units import format_bytes, parse_bytes
from ...vocabulary import Tier
from ..payload.layout import Payload, make_payload
from ..stores import served_tiers


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
            stacklevel=4,
        )


Budget = Mapping[str, str | int | None] | Mapping[Tier, str | int | None]
"""Tier -> size ("700MiB", 1.5e9 as an int, None: no limit). Tiers left out are not used."""


def parse_budget(budget: Budget, device: torch.device, mode: str) -> dict[Tier, int | None]:
    """Read a budget; raises InputError for unknown tiers, wrong sizes, and a missing HBM.

    Without an accelerator host memory is the fast tier itself: a CPU budget is then HBM's, or,
    beside one, without effect (a warning says so), but for emulation, where it is a tier of its
    own.
    """
    check_names_tiers(budget)
    parsed: dict[Tier, int | None] = {}
    for name, size in budget.items():
        if name not in list(Tier):
            raise InputError(f"budget for unknown tier {name!r}; allowed: {', '.join(Tier)}")
        if mode == "real" and Tier(name) not in served_tiers():
            raise InputError(
                f"real mode has no {name} tier; use {', '.join(sorted(served_tiers()))}, or "
                "mode='emulated', or register a store (docs/extending.md)"
            )
        parsed[Tier(name)] = None if size is None else parse_bytes(size)
    if device.type == "cpu" and mode == "real" and Tier.CPU in parsed:
        limit = parsed.pop(Tier.CPU)
        if Tier.HBM in parsed:
            warnings.warn(
                "a CPU budget has no effect here: without an accelerator, HBM is the RAM",
                stacklevel=5,
            )
        else:
            parsed[Tier.HBM] = limit
    if Tier.HBM not in parsed:
        raise InputError(
            f"budget {_write_budget(budget)} has no HBM, the memory of the compute device: add its "
            "size, such as HBM=700MiB"
        )
    return parsed


def find_place(tier: Tier, block: str, device: torch.device, mode: str) -> Tier:
    """Return where the tier of a block's hint is on this machine: without an accelerator CPU is HBM
    but for emulation. Raises InputError for a tier that isn't there.
    """
    if mode == "emulated":
        return tier
    if tier not in served_tiers():
        raise InputError(
            f"block {block!r}: real mode has no {tier} tier; use "
            f"{', '.join(sorted(served_tiers()))}, or mode='emulated', or register a store "
            "(docs/extending.md)"
        )
    return Tier.HBM if tier is Tier.CPU and device.type == "cpu" else tier


def check_names_tiers(budget: Any) -> None:
    """Raise InputError for a budget that is not a mapping."""
    if not isinstance(budget, Mapping):
        raise InputError(
            f'budget {budget!r} names no tiers: give sizes by tier, such as {{"HBM": "700MiB"}}'
        )


def _write_budget(budget: Budget) -> str:
    """Return what ``read_budget`` reads."""
    return ",".join(f"{tier}={'' if size is None else size}" for tier, size in budget.items())


def read_budget(text: str) -> dict[str, str | None]:
    """Read ``HBM=700MiB,SSD=``: a tier without a size has no limit; raises InputError."""
    budget: dict[str, str | None] = {}
    for entry in text.split(","):
        name, equals, size = entry.strip().partition("=")
        if not equals or not name:
            raise InputError(
                f"budget entry {entry!r} is not TIER=SIZE: give such as HBM=700MiB,SSD= (no size: "
                "no limit)"
            )
        if name in budget:
            raise InputError(f"the budget names {name} twice: give one size")
        budget[name] = size.strip() or None
    return budget
