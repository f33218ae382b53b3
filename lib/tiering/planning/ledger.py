"""From a model, its hints and epsilon to the ledger that the veto judges by.

What counts is bytes moved per token. A block that is streamed moves its payload once per full use;
one that is resident moves nothing, but a byte less of it makes room for a byte of another one, so
in a pass that uses every block the price of a byte is the same for both. What is only looked up
moves a few rows, so it is hardly worth compressing, unless there is nowhere to stream it from.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ...blocks import Block, unique_parameters
from ...codecs.kernels import kernel_name
from ...errors import InputError
from ...hints import Hints
from ...precision.floors import (
    Curve,
    JointCheck,
    Ledger,
    check_kernels,
    make_ledger,
    merge_curves,
    open_ledger,
    parse_epsilon,
    read_trust,
)
from ...vocabulary import Precision
from ..payload.groups import group_blocks
from ..payload.layout import Payload, lookup_moved, make_payload


def ledger_of(
    model: nn.Module,
    blocks: Iterable[Block],
    hints: Hints | None,
    *,
    epsilon: float | str | None = None,
    streams: bool = True,
    joint_check: JointCheck = JointCheck.MISSING,
    device: torch.device | str = "cpu",
) -> Ledger:
    """Return the ledger of a model's groups (``payload.group_blocks``).

    Without ``epsilon`` only the floors of the hints hold. ``streams``: there is a tier below fast
    memory. ``device`` computes. Raises InputError for a wrong epsilon, or one without
    calibrated hints.
    """
    if epsilon is not None and hints is None:
        raise InputError("epsilon needs hints, which predict what precision costs: give hints")
    shapes = dict(unique_parameters(model))
    curves = {}
    for group in group_blocks(blocks):
        known = [hints.blocks[block.name] for block in group.blocks] if hints is not None else []
        kl_nats, lowest = merge_curves(known)
        native = make_payload(group, model, shapes, None)
        cost: dict[Precision, float] = {}
        if epsilon is not None:
            payloads = {p: make_payload(group, model, shapes, p) for p in kl_nats}
            payloads = {p: payload for p, payload in payloads.items() if payload.lossy}
            kl_nats = {precision: kl_nats[precision] for precision in payloads}
            for precision, payload in {native.precision: native, **payloads}.items():
                cost[precision] = _moved_bytes(payload) if streams else payload.data_bytes
        curves[group.name] = Curve(
            native=native.precision, kl_nats=kl_nats, cost=cost, lowest=lowest
        )
    if epsilon is None:
        return open_ledger(curves)
    assert hints is not None
    nats, trust = parse_epsilon(epsilon), read_trust(hints.quality)
    if joint_check is JointCheck.MISSING:  # otherwise the whole is measured, kernels included
        name = kernel_name(device, next(model.parameters()).dtype)
        check_kernels(trust, name, epsilon=nats)
    return make_ledger(
        curves,
        epsilon=nats,
        factor=trust.factor,
        kernel_nats=trust.kernel_nats,
        joint_check=joint_check,
    )


def may_stream(budget: Mapping[Any, Any] | None) -> bool:
    """Say whether a budget (tier -> size, None: no limit) may leave weights below fast memory."""
    return budget is None or (len(budget) > 1 and set(budget.values()) != {None})


def _moved_bytes(payload: Payload) -> int:
    """Return the bytes that one token moves of a streamed payload."""
    lookup = lookup_moved(payload)
    full_uses = len(payload.group.modules) - bool(lookup)
    return full_uses * payload.data_bytes + min(lookup, payload.data_bytes)
