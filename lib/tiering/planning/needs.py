"""From a model to what the planner wants: the payload of each group at its precision, and its
needs.

Works on a model on the meta device, so a plan costs no memory.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from ...blocks import Block, routed_experts, unique_parameters
from ...codecs.kernels import Use, resident_bytes
from ...errors import InputError
from ...hints import Hints
from ...machine import MachineProfile
from ...policy.plan import BlockNeed
from ...vocabulary import Precision, most_precise
from ..payload.groups import Group, group_blocks
from ..payload.layout import Payload, codec_scratch_bytes, lookup_bytes, lookup_moved, make_payload
from .demands import Demand

_COMPUTED_AS_IS = {Precision.BF16, Precision.FP16, Precision.INT8, Precision.INT4}
"""Multiplied with as they are held also where our kernels can't be built."""
_DEFAULT_COMPUTE = 4e9
"""Weights per second of a machine that was not measured."""

PrecisionChoice = Precision | str | Mapping[str, Precision | str] | None
"""One precision for all weights, or by block name; None: as they are (lossless)."""


def make_payloads(
    model: nn.Module,
    blocks: Iterable[Block],
    *,
    precision: PrecisionChoice,
    floors: Mapping[str, Precision],
) -> dict[str, Payload]:
    """Lay out every group of a model at the precision asked for, or at its floor where that is
    higher (``floors``: by group; one that isn't there has none).

    Raises InputError for a precision or a block that doesn't exist.
    """
    shapes = dict(unique_parameters(model))
    groups = group_blocks(model, blocks)
    wanted = _wanted_precisions(precision, groups)
    payloads = {}
    for group in groups:
        choices = [wanted.get(group.name)]
        choices += [wanted.get(block.name) for block in group.blocks]
        if group.expert is not None and not any(choices):
            choices = [wanted.get(group.experts)]  # of all of a layer
        chosen = most_precise([choice for choice in choices if choice is not None])
        if chosen is not None and group.name in floors:
            chosen = most_precise([chosen, floors[group.name]])
        payloads[group.name] = make_payload(group, model, shapes, chosen)
    return payloads


def block_needs(
    model: nn.Module,
    payloads: Mapping[str, Payload],
    *,
    hints: Hints | None,
    device: torch.device,
    machine: MachineProfile,
    demands: Iterable[Demand] = (),
) -> list[BlockNeed]:
    """Return what each group asks for, in definition order. ``demands``: what was seen to be needed
    at the same time.
    """
    residents = _must_reside(payloads)
    for demand in demands:
        residents |= demand.residents(payloads)
    groups = [payload.group for payload in payloads.values()]
    experts = Counter(group.experts for group in groups if group.expert is not None)
    return [
        _need(
            model,
            payload,
            hints,
            device,
            machine,
            must_reside=name in residents,
            num_experts=experts[payload.group.experts],
        )
        for name, payload in payloads.items()
    ]


def scratch_bytes(payloads: Mapping[str, Payload], demands: Iterable[Demand] = ()) -> int:
    """Return the working memory that the payloads' weights need in fast memory."""
    lookups = max((lookup_bytes(payload) for payload in payloads.values()), default=0)
    return lookups + expanded_bytes(payloads, demands) + codec_scratch_bytes(payloads.values())


def expanded_bytes(payloads: Mapping[str, Payload], demands: Iterable[Demand] = ()) -> int:
    """Return the share of it that is taken only for as long as weights are expanded."""
    # A module may take several weights at a time (nn.LSTM), and no two modules compute at a time.
    sizes: dict[str, int] = {}
    for payload in payloads.values():
        for module in payload.group.modules:
            sizes[module] = sizes.get(module, 0) + payload.expanded_bytes
    at_once = [demand.expanded_bytes(payloads) for demand in demands]
    return max([*sizes.values(), *at_once], default=0)


def _need(
    model: nn.Module,
    payload: Payload,
    hints: Hints | None,
    device: torch.device,
    machine: MachineProfile,
    *,
    must_reside: bool,
    num_experts: int,
) -> BlockNeed:
    """Return what a group asks for; ``num_experts``: those of its layer."""
    group = payload.group
    resident = payload.data_bytes
    if payload.lossy:
        resident = sum(
            part.num_bytes
            if part.codec is None
            else resident_bytes(part.rows, part.columns, part.codec, part.uses, device)
            for part in payload.parts
        )
    num_params = sum(block.num_params for block in group.blocks)
    rate = machine.compute.get(str(payload.precision), machine.compute.get("fp32", 0.0))
    importances = [
        hint.importance
        for block in group.blocks
        if hints is not None and (hint := hints.blocks.get(block.name)) is not None
    ]
    known = [importance for importance in importances if importance is not None]
    embedding = payload.by_rows and Use.EMBEDDING in payload.parts[0].uses
    only_lookup = embedding and payload.parts[0].uses == {Use.EMBEDDING}
    compute_seconds = 0.0 if only_lookup else num_params / (rate or _DEFAULT_COMPUTE)
    lookup = lookup_moved(payload)
    routed = 0
    if group.expert is not None:
        routed = routed_experts(model, group.experts, num_experts)
        share = routed / num_experts
        lookup, compute_seconds = max(int(share * payload.num_bytes), 1), share * compute_seconds
    return BlockNeed(
        name=group.name,
        kind=str(group.kind),
        layer=group.layer,
        precision=payload.precision,
        resident_bytes=resident,
        stored_bytes=payload.num_bytes,
        unit_bytes=tuple(shard.num_bytes for shard in payload.shards),
        must_reside=must_reside,
        uses=len(group.modules),
        lookup_bytes=lookup,
        routed=routed,
        importance=max(known, default=None),
        compute_seconds=compute_seconds,
        computed_as_is=payload.lossy and payload.precision in _COMPUTED_AS_IS,
    )


def _must_reside(payloads: Mapping[str, Payload]) -> set[str]:
    """Name the groups that are held while others are used, and would keep a slot from them.

    Weights that their own modules write to can't leave. A module's own weights are held while its
    children run; of the groups that one module computes with (a head with a tied weight, and its
    bias) all but the largest are held beside that one.
    """
    users: dict[str, list[str]] = {}
    for name, payload in payloads.items():
        for module in payload.group.modules:
            names = users.setdefault(module, [])
            if payload.group.expert is None:
                names.append(name)
    residents = {name for name, payload in payloads.items() if payload.written}
    for module, names in users.items():
        enclosed = any(inner != module and _inside(inner, module) for inner in users)
        largest = max(names, key=lambda name: payloads[name].num_bytes, default=None)
        residents |= {name for name in names if enclosed or name != largest}
    return residents


def _inside(inner: str, outer: str) -> bool:
    return outer == "" or inner.startswith(f"{outer}.")


def _wanted_precisions(precision: PrecisionChoice, groups: Sequence[Group]) -> dict[str, Precision]:
    names = {block.name for group in groups for block in group.blocks}
    names |= {group.name for group in groups}
    names |= {group.experts for group in groups if group.expert is not None}
    if precision is None:
        return {}
    if isinstance(precision, str):
        return dict.fromkeys(names, _parse_precision(precision))
    unknown = sorted(set(precision) - names)
    if unknown:
        raise InputError(f"precision of {unknown[0]!r}: the model has no such block")
    return {name: _parse_precision(value) for name, value in precision.items()}


def _parse_precision(value: str) -> Precision:
    try:
        return Precision(value)
    except ValueError:
        raise InputError(
            f"precision {value!r} is unknown; allowed: {', '.join(Precision)}"
        ) from None
