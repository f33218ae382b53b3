"""attach(): from a model, its hints and a budget to a runtime.

Without a budget every block goes to the tier that its hint names; with one, the planner decides.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..blocks import (
    Block,
    BlockKind,
    digest_parameters,
    partition_model,
    tied_modules,
    unique_parameters,
    unwrap_model,
)
from ..errors import InputError
from ..hints import Hints, Tier, hints_from_json, load_hints, match_hints
from ..machine import DEFAULT_SPECS, MachineProfile, TierSpec, load_machine
from ..policy.plan import BlockNeed, Placement, Plan, Step, definition_schedule
from ..policy.planner import make_plan
from ..policy.states import placed_state
from ..policy.timeline import PassTime
from ..policy.veto import Measure, Veto
from ..precision.floors import JointCheck, raise_floors
from ..units import parse_bytes
from .admission import ledger_of
from .archive import Archive
from .emulation import EmulatedLink
from .hooks import refuse_managed
from .link import Link, RealLink
from .needs import PrecisionChoice, block_needs, make_payloads, scratch_bytes
from .originals import Originals
from .payload import Payload
from .progress import placing_bar
from .reserve import leave_room, original_bytes, warn_of_incompressible, with_originals
from .residency import Residency
from .runtime import Runtime
from .sources import CheckpointSource, open_checkpoint
from .specs import EmulationSpec
from .stores import DeviceStore, FileStore, HostStore, NumaStore, Store

Mode = Literal["real", "emulated"]
_REAL_TIERS = frozenset({Tier.HBM, Tier.CPU, Tier.CXL, Tier.SSD})
_DECLARED = MachineProfile(name="default specs", tiers=DEFAULT_SPECS)
UNMEASURED = MachineProfile(
    name="not measured",
    tiers={
        Tier.HBM: DEFAULT_SPECS[Tier.HBM],
        Tier.CPU: TierSpec("CPU", 10, 12),
        Tier.CXL: TierSpec("CXL", 2, 20),
        Tier.SSD: TierSpec("SSD", 150, 2.5),
    },
)
"""What the planner assumes of a machine that was not probed. Of two plans the one for a faster disk
spreads its transfers, and is a few percent longer on a slower one; the other way round it may stall
for half of the pass.
"""
Budget = Mapping[str, str | int | None]
"""Tier -> size ("700MiB", 1.5e9 as an int, None: no limit). Tiers left out are not used."""


def attach(
    model: nn.Module,
    hints: Hints | Mapping[str, Any] | str | Path | None = None,
    *,
    mode: Mode = "real",
    budget: Budget | None = None,
    precision: PrecisionChoice = None,
    epsilon: float | str | None = None,
    measure: Measure | None = None,
    weights: str | Path | None = None,
    machine: MachineProfile | str | Path | None = None,
    emulation: EmulationSpec | None = None,
    spill_dir: str | Path | None = None,
    device: str | torch.device | None = None,
) -> Runtime:
    """Place a model's weights and return the runtime, which is also a context manager that
    detaches.

    ``hints`` is a Hints, a parsed document of either form, or a file; it may be left out where
    there is a ``budget``, and without a budget it says where each block goes. ``budget`` bounds
    each tier (weights, slots and working memory together); without an accelerator HBM is the
    machine's RAM. ``precision`` None keeps outputs bit for bit; "int4" and the like compress every
    matrix, but none below its floor; without ``weights`` the originals go to the SSD, for detach.
    ``epsilon`` (nats per token, or "ppl=1.02") bounds what
    precision may cost altogether: it makes floors from the KL that calibrated hints predict, those
    of the fewest bytes, and without a ``precision`` every block is held at its floor. ``measure``
    runs the attached model on held-out text: precisions are raised until the upper bound of the
    measured KL is within epsilon, and only with it may a block go below 3 bits. ``weights`` is the
    safetensors checkpoint of a model on the meta device (``empty_weights()``), which is then never
    in memory as a whole. ``machine`` (machine.json) tells the planner, and an emulated run, how
    fast the tiers are. ``spill_dir`` holds the SSD tier and keeps it for the next run (default: a
    temporary folder on a disk). ``device`` is where the model computes (default: where its first
    parameter is). ``forward`` and ``generate`` keep their signatures; the model is for inference
    while attached.

    Raises InputError for hints that don't fit the model, a tier that the mode can't serve, a budget
    that is too small (with the smallest that would do) and a spill folder that is memory;
    PlacementError for a model that this or another offloader manages already, and for a plan that
    the veto refuses. The model is then as it was.
    """
    _check_arguments(mode, hints, budget, emulation, spill_dir)
    if measure is not None and epsilon is None:
        raise InputError("measure has no effect without epsilon: give both, or neither")
    refuse_managed(model)
    model = unwrap_model(model)
    blocks = partition_model(model)
    checkpoint = open_checkpoint(model, weights) if weights is not None else None
    compute_device = _resolve_device(model, device)
    loaded = _load_hints(hints, model, blocks, checkpoint)
    if isinstance(machine, str | Path):
        machine = load_machine(machine)
    profile = machine or (UNMEASURED if mode == "real" else _DECLARED)
    if mode == "emulated" and emulation is None:
        emulation = EmulationSpec(specs=dict(profile.tiers), charge_hbm=machine is None)
    veto = Veto(
        ledger_of(
            model,
            blocks,
            loaded,
            epsilon=epsilon,
            streams=budget is None or (len(budget) > 1 and set(budget.values()) != {None}),
            joint_check=JointCheck.MISSING if measure is None else JointCheck.PENDING,
        )
    )
    floors = veto.ledger.floors
    payloads = make_payloads(
        model,
        blocks,
        precision=floors if precision is None and epsilon is not None else precision,
        floors=floors,
    )
    needs = block_needs(model, payloads, hints=loaded, device=compute_device, machine=profile)
    scratch = scratch_bytes(payloads.values())
    warn_of_incompressible(payloads.values())
    kept = 0
    if checkpoint is None and mode == "real":
        kept = original_bytes(model, payloads.values())

    emulated = EmulatedLink(emulation, compute_device) if emulation is not None else None

    def plan_budget(limits: Budget, schedule: Sequence[Step]) -> Plan:
        parsed = parse_budget(limits, compute_device, mode)
        room = leave_room(parsed, kept)
        plan = with_originals(make_plan(needs, schedule, room, profile, scratch), parsed, kept)
        if emulated is not None:
            emulated.check(plan)
        return plan

    schedule = definition_schedule(needs)
    labels: dict[str, Tier] = {}
    if budget is not None:
        plan = plan_budget(budget, schedule)
    else:
        assert loaded is not None
        tiers = {name: hint.tier for name, hint in loaded.blocks.items()}
        labels = {block.name: tiers[block.name] for block in blocks}
        plan = _plan_by_hints(needs, payloads, labels, compute_device, mode, scratch)
        plan = with_originals(plan, {}, kept)
        if emulated is not None:
            emulated.check(plan)
    veto.check_plan(plan)
    stores = _Stores(Path(spill_dir) if spill_dir is not None else None, mode, compute_device)
    link: Link = emulated or RealLink(stores, compute_device)
    with torch.inference_mode(mode=False), torch.no_grad():
        originals = Originals(model, checkpoint)
        archive = Archive(stores, originals)
        residency = Residency(
            payloads, originals, link, archive, device=compute_device, emulated=mode == "emulated"
        )
        try:
            originals.prepare(
                compute_device,
                one_expert_at_a_time=[
                    payload.group.modules[0]
                    for payload in payloads.values()
                    if payload.lossy and payload.group.kind is BlockKind.EXPERT
                ],
            )
            with placing_bar(sum(each.num_bytes for each in payloads.values())) as progress:
                residency.apply(plan, schedule, progress=progress)
            veto.adopt(plan)
            runtime = Runtime(
                model,
                blocks,
                residency,
                plan,
                plan_budget,
                veto,
                emulated=emulated,
                device=compute_device,
                schedule=schedule,
                labels=labels,
            )
        except BaseException:
            residency.close()
            raise
    if measure is None:
        return runtime
    try:
        accepted = runtime.check_quality(measure).accepted
    except BaseException:
        runtime.detach()
        raise
    if accepted:
        return runtime
    runtime.detach()
    assert loaded is not None
    again = attach(
        model,
        raise_floors(loaded, veto.ledger.floors),
        mode=mode,
        budget=budget,
        precision=precision,
        epsilon=epsilon,
        measure=measure,
        weights=weights,
        machine=machine,
        emulation=emulation,
        spill_dir=spill_dir,
        device=device,
    )
    again.audit.follow(veto.audit)
    return again


def parse_budget(budget: Budget, device: torch.device, mode: str) -> dict[Tier, int | None]:
    """Read a budget; raises InputError for unknown tiers, sizes that are none, and a missing HBM.

    Without an accelerator host memory is the fast tier itself: a CPU budget is then HBM's, or,
    beside one, without effect (a warning says so), but for emulation, where it is a tier of its
    own.
    """
    _check_names_tiers(budget)
    parsed: dict[Tier, int | None] = {}
    for name, size in budget.items():
        if name not in list(Tier):
            raise InputError(f"budget for unknown tier {name!r}; allowed: {', '.join(Tier)}")
        if mode == "real" and Tier(name) not in _REAL_TIERS:
            raise InputError(
                f"real mode has no {name} tier; use {', '.join(sorted(_REAL_TIERS))}, or "
                "mode='emulated'"
            )
        parsed[Tier(name)] = None if size is None else parse_bytes(size)
    if device.type == "cpu" and mode == "real" and Tier.CPU in parsed:
        limit = parsed.pop(Tier.CPU)
        if Tier.HBM in parsed:
            warnings.warn(
                "a CPU budget has no effect here: without an accelerator, HBM is the RAM",
                stacklevel=3,
            )
        else:
            parsed[Tier.HBM] = limit
    if Tier.HBM not in parsed:
        raise InputError(
            f"budget {dict(budget)!r} has no HBM, the memory of the compute device: give one, such "
            'as {"HBM": "700MiB", "SSD": None}'
        )
    return parsed


class _Stores(dict[Tier, Store]):
    """The stores of the tiers, each made when it is first used."""

    def __init__(self, folder: Path | None, mode: Mode, device: torch.device) -> None:
        super().__init__()
        self._folder = folder
        self._mode = mode
        self._device = device

    def __missing__(self, tier: Tier) -> Store:
        if self._mode == "emulated":
            self[tier] = DeviceStore(self._device)
        elif tier is Tier.SSD:
            self[tier] = FileStore(self._folder)
        elif tier is Tier.CXL:
            self[tier] = NumaStore(pinned=self._device.type == "cuda")
        else:
            self[tier] = HostStore(pinned=self._device.type == "cuda")
        return self[tier]


def _check_names_tiers(budget: Any) -> None:
    if not isinstance(budget, Mapping):
        raise InputError(
            f'budget {budget!r} names no tiers: give sizes by tier, such as {{"HBM": "700MiB"}}'
        )


def _check_arguments(
    mode: str,
    hints: Any,
    budget: Budget | None,
    emulation: EmulationSpec | None,
    spill_dir: str | Path | None,
) -> None:
    if mode not in ("real", "emulated"):
        raise InputError(f"mode {mode!r} is unknown; allowed: real, emulated")
    if mode == "real" and emulation is not None:
        raise InputError(
            "an emulation spec has no effect in real mode: leave it out, or use mode='emulated'"
        )
    if mode == "emulated" and spill_dir is not None:
        raise InputError(
            "a spill_dir has no effect in emulated mode: leave it out, or use mode='real'"
        )
    if budget is not None:
        _check_names_tiers(budget)
    if hints is None and budget is None:
        raise InputError("neither hints nor a budget: give one, or there is nothing to place by")


def _load_hints(
    hints: Hints | Mapping[str, Any] | str | Path | None,
    model: nn.Module,
    blocks: tuple[Block, ...],
    checkpoint: CheckpointSource | None,
) -> Hints | None:
    """Load hints and match them with the model; the result has exactly the model's blocks."""
    if hints is None:
        return None
    if isinstance(hints, str | Path):
        hints = load_hints(hints)
    elif not isinstance(hints, Hints):
        hints = hints_from_json(hints)
    digest = None
    if hints.model is not None:
        names = sorted(unique_parameters(model))
        if checkpoint is None:
            given = unique_parameters(model)
            digest = digest_parameters((name, given[name].detach()) for name in names)
        else:
            digest = digest_parameters((name, checkpoint.read(name)) for name in names)
    matched = match_hints(
        hints,
        [block.name for block in blocks],
        parameter_digest=digest,
        tied=tied_modules(blocks),
    )
    return replace(hints, blocks=matched)


def _plan_by_hints(
    needs: Sequence[BlockNeed],
    payloads: Mapping[str, Payload],
    tiers: Mapping[str, Tier],
    device: torch.device,
    mode: Mode,
    scratch: int,
) -> Plan:
    """Put every group where the hints of its blocks say: where most of its bytes should be.

    What computes around other groups stays in fast memory. One slot, and two where they cost less
    than half of what leaving saves.
    """
    placements = {}
    for need in needs:
        shares: dict[Tier, int] = {}
        for block in payloads[need.name].group.blocks:
            tier = _served_tier(block.name, tiers[block.name], device, mode)
            shares[tier] = shares.get(tier, 0) + block.num_bytes
        order = list(Tier)
        tier = max(shares, key=lambda tier: (shares[tier], order.index(tier)))
        reason = "the hints' tier"
        if need.must_reside and tier is not Tier.HBM:
            tier, reason = Tier.HBM, "other blocks compute inside it"
        resident = tier is Tier.HBM
        placements[need.name] = Placement(
            tier=tier,
            precision=need.precision,
            state=placed_state(tier, need.precision, computed_as_is=need.computed_as_is),
            reason=reason,
            resident_bytes=need.resident_bytes if resident else 0,
            stored_bytes=need.stored_bytes,
            unit_bytes=() if resident else need.unit_bytes,
        )
    units = [size for placement in placements.values() for size in placement.unit_bytes]
    saved = sum(need.resident_bytes for need in needs if placements[need.name].tier is not Tier.HBM)
    slot_bytes = max(units, default=0)
    return Plan(
        placements=placements,
        slot_bytes=slot_bytes,
        num_slots=0 if not units else 2 if len(units) > 1 and 4 * slot_bytes < saved else 1,
        scratch_bytes=scratch,
        budget={},
        predicted=PassTime(0.0, 0.0, 0.0, 0),
    )


def _served_tier(block: str, tier: Tier, device: torch.device, mode: Mode) -> Tier:
    """Return where a tier's blocks are on this machine; refuses tiers that it lacks."""
    if mode == "emulated":
        return tier
    if tier not in _REAL_TIERS:
        raise InputError(
            f"block {block!r}: real mode has no {tier} tier; use HBM, CPU, CXL or SSD, or "
            "mode='emulated'"
        )
    return Tier.HBM if tier is Tier.CPU and device.type == "cpu" else tier


def _resolve_device(model: nn.Module, device: str | torch.device | None) -> torch.device:
    """Return the compute device with its index, so that it compares equal to a tensor's device."""
    if device is None:
        first = next(model.parameters()).device
        return torch.device("cpu") if first.type == "meta" else first
    try:
        resolved = torch.empty(0, device=device).device
        if resolved.type not in ("cpu", "cuda"):
            raise InputError(
                f"device {str(device)!r} is no place to compute here: give cpu or cuda"
            )
        return resolved
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device {str(device)!r} can't be used here: {str(error).splitlines()[0]}"
        ) from error
