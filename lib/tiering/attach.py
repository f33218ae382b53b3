"""attach(): from a model, its hints and a budget to a runtime."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..blocks import (
    Block,
    digest_parameters,
    partition_model,
    tied_modules,
    unique_parameters,
    unwrap_model,
)
from ..checkpoint.fit import check_fit
from ..checkpoint.source import CheckpointSource, open_checkpoint
from ..errors import InputError
from ..hints import Hints, hints_from_json, load_hints, match_hints
from ..machine import DEFAULT_SPECS, MachineProfile, choose_machine, load_machine
from ..policy.veto import Measure, Veto
from ..precision.floors import JointCheck
from ..vocabulary import Tier
from .hooks.managed import refuse_managed
from .keeper import PlanKeeper
from .planning.budget import Budget, check_names_tiers, warn_of_incompressible
from .planning.ledger import ledger_of, may_stream
from .planning.needs import PrecisionChoice
from .planning.plans import Mode, Planning
from .residency.archive import Archive
from .residency.originals import Originals
from .residency.stand_ins import plain_tensors
from .runtime import Runtime
from .stores import DeviceStore, FileStore, HostStore, NumaStore, Store
from .transfer.charges import Charges
from .transfer.emulation import EmulatedTime, EmulatedTransport
from .transfer.readers import ReaderTransport
from .transfer.specs import EmulationSpec

_DECLARED = MachineProfile(name="default specs", tiers=DEFAULT_SPECS)


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
    safetensors checkpoint of a model on the meta device (``load(folder)``, or built inside
    ``empty_weights()``), which is then never in memory as a whole. ``machine`` (machine.json) tells
    the planner, and an emulated run, how fast the tiers are. ``spill_dir`` holds the SSD tier and
    keeps it for the next run (default: a temporary folder on a disk). ``device`` is where the model
    computes (default: where its first parameter is). ``forward`` and ``generate`` keep their
    signatures; the model is for inference while attached.

    Raises InputError for hints that don't fit the model, a tier that the mode can't serve, a budget
    that is too small (with the smallest that would do), a checkpoint that is quantized or another
    model's, and a spill folder that is memory;
    PlacementError for a model that this or another offloader manages already, and for a plan that
    the veto refuses. The model is then as it was.
    """
    _check_arguments(mode, hints, budget, emulation, spill_dir)
    if measure is not None and epsilon is None:
        raise InputError("measure has no effect without epsilon: give both, or neither")
    refuse_managed(model)
    model = unwrap_model(model)
    blocks = partition_model(model)
    checkpoint = None
    if weights is not None:
        checkpoint = open_checkpoint(model, weights)
        check_fit(model, checkpoint)
    compute_device = _resolve_device(model, device)
    loaded = _load_hints(hints, model, blocks, checkpoint)
    if isinstance(machine, str | Path):
        machine = load_machine(machine)
    profile = choose_machine(machine) if mode == "real" else machine or _DECLARED
    if mode == "emulated" and emulation is None:
        emulation = EmulationSpec(specs=dict(profile.tiers), charge_hbm=machine is None)
    veto = Veto(
        ledger_of(
            model,
            blocks,
            loaded,
            epsilon=epsilon,
            streams=may_stream(budget),
            joint_check=JointCheck.MISSING if measure is None else JointCheck.PENDING,
            device=compute_device,
        )
    )
    charges = EmulatedTime(emulation, compute_device) if emulation is not None else Charges()
    planning = Planning(
        model,
        blocks,
        loaded,
        precision=precision,
        at_floors=precision is None and epsilon is not None,
        floors=veto.ledger.floors,
        device=compute_device,
        mode=mode,
        machine=profile,
        keeps_originals=checkpoint is None and mode == "real",
        charges=charges,
    )
    warn_of_incompressible(planning.payloads.values())
    plan = planning.make_plan(budget, planning.schedule)
    stores = _Stores(Path(spill_dir) if spill_dir is not None else None, mode, compute_device)
    with plain_tensors():
        originals = Originals(model, checkpoint)
    keeper = PlanKeeper(
        plan,
        planning,
        veto,
        originals=originals,
        archive=Archive(stores, originals),
        transport=(
            EmulatedTransport(charges)
            if isinstance(charges, EmulatedTime)
            else ReaderTransport(stores, compute_device)
        ),
        charges=charges,
        device=compute_device,
        emulated=mode == "emulated",
    )
    runtime = Runtime(keeper)
    if measure is not None:
        try:
            runtime.check_quality(measure)
        except BaseException:
            runtime.detach()
            raise
    return runtime


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
        check_names_tiers(budget)
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
