"""plan(): where a model's weights go within a budget, and how fast that is, without running it.

``attach`` carries out what it returns, so what is planned is what happens.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...blocks import Block, partition_model
from ...checkpoint.source import CheckpointSource
from ...errors import InputError
from ...hints import Hints
from ...machine import DEFAULT_SPECS, MachineProfile, choose_machine, load_machine
from ...policy.plan import BlockNeed, Plan, Step
from ...policy.planner.limit import limit_seconds
from ...policy.veto import Veto
from ...precision.floors import JointCheck
from ..transfer.specs import EmulationSpec
from .budget import Budget, check_names_tiers, warn_of_incompressible
from .inputs import HintsGiven, check_digest, choose_device, is_in_memory, open_model, read_hints
from .ledger import ledgers_of
from .needs import PrecisionChoice
from .plans import Mode, Planning

_EMULATED = MachineProfile(name="default specs", tiers=DEFAULT_SPECS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A plan, and what it was made from: all that ``attach`` needs to carry it out."""

    plan: Plan
    model: nn.Module
    blocks: tuple[Block, ...]
    checkpoint: CheckpointSource | None
    """What ``weights`` names."""
    hints: Hints | None
    """With exactly the model's blocks."""
    device: torch.device
    machine: MachineProfile
    emulation: EmulationSpec | None
    """What an emulated run charges; None in real mode."""
    planning: Planning
    """Makes the plans that may follow."""
    frugal: Planning
    """Makes those with the fewest bytes, whatever their time."""
    veto: Veto
    """Has admitted the plan; nothing is held yet."""
    moves: tuple[str, ...]
    """The blocks in an order in which they can be placed."""
    schedule: tuple[Step, ...]
    """The uses that the plan expects of a pass."""

    @property
    def needs(self) -> list[BlockNeed]:
        """What each block asks for."""
        return self.planning.needs

    @property
    def router_counts(self) -> dict[str, float]:
        """How often tokens were routed to each expert, where the hints say it."""
        blocks = {} if self.hints is None else self.hints.blocks
        found = {name: hint.signals.get("router_counts") for name, hint in blocks.items()}
        return {
            name: float(count) for name, count in found.items() if isinstance(count, int | float)
        }

    @property
    def weight_bytes(self) -> int:
        """The fast memory that all weights take as they are held."""
        return sum(need.resident_bytes for need in self.needs)

    @property
    def smallest_hbm_bytes(self) -> int | None:
        """The smallest HBM budget that works beside the other tiers' limits; None without a budget.

        Computed at each call.
        """
        budget = self.plan.budget
        return self.frugal.smallest_budget(budget, self.schedule) if budget else None

    @property
    def limit_seconds(self) -> float | None:
        """What no runtime can beat with this budget; None without one."""
        budget = self.plan.budget
        return limit_seconds(self.needs, self.plan, self.machine) if budget else None

    def check_weights(self) -> None:
        """Refuse hints that were made for other weights than the checkpoint's; samples are read."""
        if self.hints is not None and self.checkpoint is not None:
            check_digest(self.hints, self.model, self.blocks, self.checkpoint)

    def quality(self) -> dict[str, Any]:
        """Return the nats per token that the plan is predicted to cost, by block and in all."""
        ledger = self.veto.ledger
        return {
            **self.veto.to_json(self.plan),
            "blocks": {
                name: {
                    "floor": str(ledger.floors[name]),
                    "predicted_nats": ledger.predicted(name, place.precision),
                    "bound_nats": ledger.bound(name, place.precision),
                }
                for name, place in self.plan.placements.items()
            },
        }

    def to_json(self) -> dict[str, Any]:
        """Return the plan and what was predicted of it as a document."""
        predicted, limit = self.plan.predicted, self.limit_seconds
        return {
            "device": str(self.device),
            "machine": {"name": self.machine.name, "measured": self.machine.measured},
            "weight_bytes": self.weight_bytes,
            "smallest_hbm_bytes": self.smallest_hbm_bytes,
            "predicted": {
                "ms_per_token": predicted.seconds * 1e3,
                "tokens_per_s": 1 / predicted.seconds if predicted.seconds else None,
                "peak_fast_bytes": self.plan.fast_bytes,
                "bytes_per_token": predicted.moved_bytes,
            },
            "limit_ms_per_token": None if limit is None else limit * 1e3,
            "quality": self.quality() if self.veto.is_bounded else None,
            "plan": self.plan.to_json(),
        }


def plan(
    model: nn.Module | str | Path,
    hints: HintsGiven = None,
    *,
    mode: Mode = "real",
    budget: Budget | None = None,
    precision: PrecisionChoice = None,
    epsilon: float | str | None = None,
    will_measure: bool = False,
    weights: str | Path | None = None,
    machine: MachineProfile | str | Path | None = None,
    emulation: EmulationSpec | None = None,
    device: str | torch.device | None = None,
) -> Planned:
    """Plan what ``attach`` would do with the same arguments; nothing is moved or loaded.

    ``model`` may also be a folder: a checkpoint, of which the headers are read, or a config.json
    alone. Its plan is that of ``attach(load(folder), weights=folder)``; that of a model in memory
    has room on the SSD for the originals of compressed weights. ``will_measure``: attach is to have
    a ``measure``, so blocks may go below 3 bits. ``device`` need not be here. Whether hints were
    made for the weights of a checkpoint is left to ``attach``, which reads them.

    Raises InputError and PlacementError as ``attach`` does before it moves anything.
    """
    _check_arguments(mode, hints, budget, emulation)
    if will_measure and epsilon is None:
        raise InputError("measure has no effect without epsilon: give both, or neither")
    empty, checkpoint = open_model(model, weights)
    blocks = partition_model(empty)
    compute_device = choose_device(empty, device)
    loaded = read_hints(hints, empty, blocks)
    profile = _choose_machine(machine, mode)
    if mode == "emulated" and emulation is None:
        emulation = EmulationSpec(specs=dict(profile.tiers), charge_hbm=machine is None)
    ledgers = ledgers_of(
        empty,
        blocks,
        loaded,
        profile,
        budget,
        epsilon=epsilon,
        joint_check=JointCheck.PENDING if will_measure else JointCheck.MISSING,
        device=compute_device,
    )
    tried: list[tuple[Plan, Planning, Veto]] = []
    for ledger in ledgers:
        planning = Planning(
            empty,
            blocks,
            loaded,
            precision=precision,
            at_floors=precision is None and epsilon is not None,
            floors=ledger.floors,
            device=compute_device,
            mode=mode,
            machine=profile,
            keeps_originals=checkpoint is None and mode == "real" and is_in_memory(empty),
            emulation=emulation,
        )
        try:
            tried.append((planning.make_plan(budget, planning.schedule), planning, Veto(ledger)))
        except InputError:
            if not tried:  # not even with the fewest bytes
                raise
    made, planning, veto = min(tried, key=lambda each: each[0].predicted.seconds)
    warn_of_incompressible(planning.payloads.values())
    return Planned(
        plan=made,
        model=empty,
        blocks=blocks,
        checkpoint=checkpoint,
        hints=loaded,
        device=compute_device,
        machine=profile,
        emulation=emulation,
        planning=planning,
        frugal=tried[0][1],
        veto=veto,
        moves=veto.judge(made),
        schedule=planning.schedule,
    )


def _choose_machine(given: MachineProfile | str | Path | None, mode: Mode) -> MachineProfile:
    """Return the machine that plans are for; emulation is of one that isn't here."""
    if mode == "real":
        return choose_machine(given)
    if given is None:
        return _EMULATED
    return given if isinstance(given, MachineProfile) else load_machine(given)


def _check_arguments(
    mode: str, hints: Any, budget: Budget | None, emulation: EmulationSpec | None
) -> None:
    if mode not in ("real", "emulated"):
        raise InputError(f"mode {mode!r} is unknown; allowed: real, emulated")
    if mode == "real" and emulation is not None:
        raise InputError(
            "an emulation spec has no effect in real mode: leave it out, or use mode='emulated'"
        )
    if budget is not None:
        check_names_tiers(budget)
    if hints is None and budget is None:
        raise InputError("neither hints nor a budget: give one, or there is nothing to place by")
