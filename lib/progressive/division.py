"""How a budget is divided between a draft and the full weights, by predicted tokens per second."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ..codecs.records import RAW_DTYPES
from ..codecs.residuals import RANK_BITS, decode_rate
from ..errors import InputError
from ..machine import MachineProfile
from ..precision.allocate import allocate_precisions
from ..precision.perturb import CURVE_PRECISIONS
from ..precision.sizes import PrecisionMap, stored_sizes
from ..tiering import Planned, plan
from ..tiering.payload.known import is_coded
from ..tiering.planning.budget import check_names_tiers
from ..tiering.planning.needs import PrecisionChoice
from ..tiering.probe.compute import measure_rows
from ..tiering.stores import STAGING_BYTES
from ..units import GB, format_bytes, parse_bytes
from ..vocabulary import Precision, Tier
from .windows import expected_tokens

WIDTHS = tuple(width for width in CURVE_PRECISIONS if width is not Precision.BF16)
"""Of drafts, the most precise first."""
_SHARE = 0.6
"""Of the fast memory, what the draft takes at most where nothing predicts its acceptance."""
_SPREAD = 0.79
"""The mean over tokens of the root of their KL, over the root of their mean KL."""
_DECODING = 6.0
"""What decoding residuals takes of a pass, over what it takes a thread alone: the cores compute
meanwhile (measured: docs/exact.md).
"""
LONGEST = 31
"""Tokens drafted for one pass, at most: with one before them a pass has 32 rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """How a budget is divided between the draft, which resides, and the full weights.

    ``name`` says which draft it is; None: what epsilon allows. ``acceptance``: the share of drafted
    tokens that is predicted to be accepted; None: there is no prediction. ``tokens_per_second``:
    predicted with windows of ``window`` tokens.
    """

    precision: PrecisionChoice
    draft: Planned
    full: Planned
    acceptance: float | None
    window: int
    tokens_per_second: float
    budget: Mapping[str, int | None]
    """What the full weights have."""
    name: str | None
    residuals: bool = False
    """Of the full weights, only what the draft's records lack comes from the SSD."""

    @property
    def draft_limit(self) -> int | None:
        """The fast memory that the draft may take: what was planned for it, also where it turns out
        to need more room for weights as they compute; None: any.
        """
        return None if self.budget[Tier.HBM] is None else self.draft.plan.fast_bytes

    def to_json(self) -> dict[str, Any]:
        """Return what was chosen, and predicted of it, as a document."""
        return {
            "precision": self.name,
            "residuals": self.residuals,
            "draft_bytes": self.draft.plan.fast_bytes,
            "full_bytes": self.full.plan.fast_bytes,
            "acceptance": self.acceptance,
            "window": self.window,
            "draft_ms": self.draft.plan.predicted.seconds * 1e3,
            "pass_ms": self.full.plan.predicted.seconds * 1e3,
            "tokens_per_s": self.tokens_per_second,
        }


def divide(
    model: nn.Module | str | Path,
    hints: Any,
    *,
    budget: Mapping[Any, Any],
    precision: Any = None,
    epsilon: float | str | None = None,
    **common: Any,
) -> Division:
    """Divide a budget: of the drafts that leave room for the full weights to stream, the one with
    the most tokens per second by what calibrated hints predict, or one of a given ``precision`` or
    ``epsilon``. A draft is of one width, or of the bytes of one, mixed as the hints' KL curves have
    it. Of ``common`` both sides' plans are made.

    Raises InputError where the budget doesn't hold any draft beside the full weights' slots.
    """
    check_names_tiers(budget)
    if Tier.HBM not in budget:
        raise InputError(
            f"the budget names {', '.join(map(str, budget))} and no HBM, which draft and full "
            "weights divide: add its size, such as HBM=4GiB"
        )
    given = precision is not None or epsilon is not None
    everything = {**budget, "HBM": None}
    found: list[Division] = []
    failure: InputError | None = None
    for draft, choice, name in _drafts(
        partial(plan, model, hints, budget=everything, epsilon=epsilon, **common),
        [precision] if given else WIDTHS,
    ):
        rest = _without(budget, draft.plan.fast_bytes)
        if rest is None:
            continue
        passes = {**common, "machine": _machine_of_passes(draft, common.get("machine"))}
        try:
            full = plan(model, hints, budget=rest, **passes)
        except InputError as error:
            failure = error
            continue
        ways = [_predict(draft, full, rest, precision=choice, name=name)]
        if (way := _with_residuals(ways[0], model, hints, budget, passes)) is not None:
            ways.append(way)
        found.append(max(ways, key=lambda each: each.tokens_per_second))
    if not found:
        limit = _hbm_limit(budget)
        if limit is None:
            assert failure is not None
            raise failure
        streaming = plan(model, hints, budget=everything, **common).smallest_hbm_bytes or 0
        least = draft.plan.fast_bytes + streaming
        raise InputError(
            f"HBM={format_bytes(limit)} doesn't hold a draft ({draft.plan.fast_bytes} bytes) and "
            f"the full weights as they stream ({streaming}): the smallest that works is HBM={least}"
        )
    if given or all(each.acceptance is not None for each in found):
        return max(found, key=lambda each: each.tokens_per_second)
    limit = _hbm_limit(budget)
    for each in found:  # the most precise that leaves the full weights their share
        if limit is None or each.draft.plan.fast_bytes <= _SHARE * limit:
            return each
    return found[-1]


def predict_acceptance(nats: float) -> float:
    """Return the share of sampled tokens that a draft of this KL, nats per token, chooses as the
    full model does with the same noise.

    Where logits of a token differ by independent normal amounts, its KL is half their variance, and
    the largest after Gumbel noise is another one with a chance of sqrt(2 KL / pi), to first order.
    Tokens differ in their KL, which leaves 0.79 of that, as measured (docs/exact.md); beyond the
    first order the chance of the same token falls exponentially.
    """
    return math.exp(-_SPREAD * math.sqrt(2 * nats / math.pi))


def _drafts(
    plan_draft: Callable[..., Planned], choices: Sequence[PrecisionChoice]
) -> Iterator[tuple[Planned, PrecisionChoice, str | None]]:
    """Yield drafts with what to attach them with, and their names."""
    for choice in choices:
        draft = plan_draft(precision=choice)
        name = None if choice is None else "mixed" if isinstance(choice, Mapping) else str(choice)
        yield draft, choice, name
        if len(choices) > 1 and (mixed := _mix(draft, Precision(str(choice)))) is not None:
            yield plan_draft(precision=mixed), mixed, f"mixed, of {name}'s bytes"


def _mix(draft: Planned, width: Precision) -> PrecisionMap | None:
    """Return the precisions of the least KL in the bytes of a width; None: nothing predicts them,
    or they are those of the width.
    """
    hints = {} if draft.hints is None else draft.hints.blocks
    names = [name for name, hint in hints.items() if set(WIDTHS) <= hint.kl.keys()]
    if not names:
        return None
    sizes = stored_sizes(draft.model, WIDTHS, names=names)
    uniform = sizes.uniform(width)
    options = sizes.options({name: hints[name].kl for name in sizes.num_params})
    mixed = allocate_precisions(options, cost_budget=sizes.bytes_of(uniform)).precisions
    return None if mixed == uniform else mixed


def _predict(
    draft: Planned,
    full: Planned,
    rest: Mapping[str, int | None],
    *,
    precision: PrecisionChoice,
    name: str | None,
) -> Division:
    nats = draft.veto.to_json(draft.plan)["predicted_nats"]
    acceptance = None if nats is None else predict_acceptance(nats)
    assumed = 0.9 if acceptance is None else acceptance
    seconds, step = full.plan.predicted.seconds, draft.plan.predicted.seconds
    rates = {
        length: expected_tokens(assumed, length) / max(seconds + length * step, 1e-9)
        for length in range(LONGEST + 1)
    }
    window = max(rates, key=lambda length: rates[length])
    return Division(
        precision=precision,
        name=name,
        draft=draft,
        full=full,
        acceptance=acceptance,
        window=window,
        tokens_per_second=rates[window],
        budget=rest,
    )


def _machine_of_passes(draft: Planned, given: Any) -> Any:
    """Return the machine that a pass's plan is for, whose products have as many rows as a pass:
    this one's processor is timed with them, any other is taken as it is given.
    """
    here = draft.machine.measured or not draft.machine.compute
    if draft.emulation is not None or draft.device.type != "cpu" or not here:
        return given
    compute = dict(draft.machine.compute)
    dtypes = {parameter.dtype for parameter in draft.model.parameters()}
    for precision, dtype in RAW_DTYPES.items():
        if dtype not in dtypes:
            continue
        rate = measure_rows(LONGEST + 1, dtype)
        compute[str(precision)] = min(rate, compute.get(str(precision), rate))
    return replace(draft.machine, compute=compute)


def _with_residuals(
    plain: Division, model: Any, hints: Any, budget: Mapping[Any, Any], common: Mapping[str, Any]
) -> Division | None:
    """Divide as another division does, with the full weights as residuals; None: they aren't read
    from a checkpoint, this machine can't, they would be slower to read, or there is no room.
    """
    saved = common.get("weights") is not None or not isinstance(model, nn.Module)
    machine = _machine_with_residuals(plain.draft, plain.full) if saved else None
    rest = _without(budget, plain.draft.plan.fast_bytes + STAGING_BYTES)
    if machine is None or rest is None:
        return None
    try:
        full = plan(model, hints, budget=rest, **{**common, "machine": machine})
    except InputError:
        return None
    way = _predict(plain.draft, full, rest, precision=plain.precision, name=plain.name)
    return replace(way, residuals=True)


def _machine_with_residuals(draft: Planned, full: Planned) -> MachineProfile | None:
    """Return the machine with an SSD as fast as reading residuals and decoding them, one after the
    other. None: that isn't faster.
    """
    ssd = full.machine.tiers.get(Tier.SSD)
    rate = decode_rate() if full.device.type == "cpu" and full.emulation is None else 0.0
    if ssd is None or not rate:
        return None
    num_bytes, coded_bytes, weights = 0, 0.0, 0
    drafted = {
        part.parameter: part.record
        for payload in draft.planning.payloads.values()
        for part in payload.parts
        if part.record is not None and not part.transposed
    }
    for payload in full.planning.payloads.values():
        for part in payload.parts:
            num_bytes += part.num_bytes
            coded_bytes += part.num_bytes
            layout = drafted.get(part.parameter)
            if layout is not None and is_coded(part, layout):
                count = part.shape.numel()
                coded_bytes += count * (RANK_BITS[layout.precision] / 8 - 2)
                weights += count
    seconds = coded_bytes / (ssd.bandwidth_gb_s * GB) + _DECODING * weights / rate
    bandwidth = num_bytes / GB / seconds
    if bandwidth <= ssd.bandwidth_gb_s:
        return None
    tiers = {**full.machine.tiers, Tier.SSD: replace(ssd, bandwidth_gb_s=bandwidth)}
    return replace(full.machine, tiers=tiers)


def _without(budget: Mapping[Any, Any], num_bytes: int) -> dict[str, int | None] | None:
    """Return what a draft leaves of a budget; None: nothing of its fast memory."""
    left: dict[str, int | None] = {
        str(tier): None if size is None else parse_bytes(size) for tier, size in budget.items()
    }
    limit = _hbm_limit(budget)
    if limit is not None:
        if num_bytes >= limit:
            return None
        left[str(Tier.HBM)] = limit - num_bytes
    return left


def _hbm_limit(budget: Mapping[Any, Any]) -> int | None:
    size = budget.get(Tier.HBM)
    return None if size is None else parse_bytes(size)
