"""From a model, its hints and epsilon to the ledger that the veto judges by.

What counts is bytes moved per token. A block that is streamed moves its payload once per full use;
one that is resident moves nothing, but a byte less of it makes room for a byte of another one, so
in a pass that uses every block the price of a byte is the same for both. What is only looked up
moves a few rows, so it is hardly worth compressing, unless there is nowhere to stream it from.

Fewest bytes are the least time where kernels read all widths at the same speed. A width that this
machine is slow at costs the bytes that are read meanwhile (``Pace``).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...blocks import Block, unique_parameters
from ...codecs.kernels import kernel_name
from ...codecs.records import default_codec
from ...errors import InputError
from ...hints import Hints
from ...machine import MachineProfile
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
from ...units import GB
from ...vocabulary import Precision, Tier
from ..payload.groups import group_blocks
from ..payload.layout import Payload, lookup_moved, make_payload

_TOLERANCE = 1.1
"""Probes differ by as much from one another."""
_SHAPE = (4096, 1024)
"""Of a matrix whose bytes per weight are those of large ones."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How many bytes are read while weights of a width are computed with.

    ``weights_per_s``: by precision, as probed; what isn't there is taken to be as fast as its
    bytes. ``bytes_per_s``: of the memory, or the link, that they are read from.
    """

    weights_per_s: Mapping[str, float]
    bytes_per_s: float

    def price(self, payload: Payload, moved: int) -> int:
        """Return what a token costs, in bytes, of which ``moved`` are moved. A lookup computes
        nothing.
        """
        rate = self.weights_per_s.get(str(payload.precision))
        uses = len(payload.group.modules) - bool(lookup_moved(payload))
        if rate is None:
            return moved
        num_params = sum(block.num_params for block in payload.group.blocks)
        return max(moved, int(uses * num_params / rate * self.bytes_per_s / _TOLERANCE))


def ledgers_of(
    model: nn.Module,
    blocks: Sequence[Block],
    hints: Hints | None,
    machine: MachineProfile,
    budget: Mapping[Any, Any] | None,
    *,
    epsilon: float | str | None,
    joint_check: JointCheck,
    device: torch.device,
) -> list[Ledger]:
    """Return the ledger with the fewest bytes first, and with epsilon those whose floors differ
    since widths cost the time that they take on this machine, if its kernels were probed.

    Raises InputError like ``ledger_of``.
    """
    ledgers: list[Ledger] = []
    paces = _paces_of(machine, budget) if epsilon is not None else []
    for pace in (None, *paces):
        ledger = ledger_of(
            model,
            blocks,
            hints,
            epsilon=epsilon,
            streams=may_stream(budget),
            joint_check=joint_check,
            device=device,
            pace=pace,
        )
        if all(ledger.floors != known.floors for known in ledgers):
            ledgers.append(ledger)
    return ledgers


def _paces_of(machine: MachineProfile, budget: Mapping[Any, Any] | None) -> list[Pace]:
    """Return the paces of a machine whose kernels were probed: first of resident weights, which are
    read as fast as those of the best width, then of streamed ones, which come by the fastest link
    that the budget (tier -> size) names.
    """
    rates = machine.compute
    if not rates:
        return []
    sizes = {p: default_codec(p).layout(*_SHAPE).num_bytes / math.prod(_SHAPE) for p in Precision}
    paces = [Pace(rates, max(rate * sizes[Precision(name)] for name, rate in rates.items()))]
    links = [
        spec.bandwidth_gb_s
        for tier, spec in machine.tiers.items()
        if tier is not Tier.HBM and (budget is None or tier in budget)
    ]
    if links:
        paces.append(Pace(rates, max(links) * GB))
    return paces


def ledger_of(
    model: nn.Module,
    blocks: Iterable[Block],
    hints: Hints | None,
    *,
    epsilon: float | str | None = None,
    streams: bool = True,
    joint_check: JointCheck = JointCheck.MISSING,
    device: torch.device | str = "cpu",
    pace: Pace | None = None,
) -> Ledger:
    """Return the ledger of a model's groups (``payload.group_blocks``).

    Without ``epsilon`` only the floors of the hints hold. ``streams``: there is a tier below fast
    memory. ``device`` computes, at such a ``pace`` (None: that of memory). Raises InputError for a
    wrong epsilon, or one without calibrated hints.
    """
    if epsilon is not None and hints is None:
        raise InputError("epsilon needs hints, which predict what precision costs: give hints")
    shapes = dict(unique_parameters(model))
    curves = {}
    for group in group_blocks(model, blocks):
        known = [hints.blocks[block.name] for block in group.blocks] if hints is not None else []
        kl_nats, lowest = merge_curves(known)
        native = make_payload(group, model, shapes, None)
        cost: dict[Precision, float] = {}
        if epsilon is not None:
            payloads = {p: make_payload(group, model, shapes, p) for p in kl_nats}
            payloads = {p: payload for p, payload in payloads.items() if payload.lossy}
            kl_nats = {precision: kl_nats[precision] for precision in payloads}
            for precision, payload in {native.precision: native, **payloads}.items():
                moved = _moved_bytes(payload) if streams else payload.data_bytes
                cost[precision] = moved if pace is None else pace.price(payload, moved)
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
