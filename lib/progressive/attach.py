"""attach(), with the full model's exact output as one of what it gives."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..errors import InputError
from ..machine import MachineProfile
from ..policy.veto import Measure
from ..tiering import EmulationSpec, Runtime
from ..tiering import attach as attach_tiers
from ..tiering.planning.budget import Budget
from ..tiering.planning.inputs import HintsGiven
from ..tiering.planning.needs import PrecisionChoice
from ..tiering.planning.plans import Mode
from .division import divide
from .draft import Draft
from .exact import ExactRuntime
from .requests import check_can_draft, check_strict

Exact = bool | Literal["strict"]


def attach(
    model: nn.Module,
    hints: HintsGiven = None,
    *,
    # What it may take.
    budget: Budget | None = None,
    weights: str | Path | None = None,
    spill_dir: str | Path | None = None,
    look_ahead: bool = True,
    # What it may cost.
    precision: PrecisionChoice = None,
    epsilon: float | str | None = None,
    measure: Measure | None = None,
    exact: Exact = False,
    # Where it computes.
    device: str | torch.device | None = None,
    machine: MachineProfile | str | Path | None = None,
    mode: Mode = "real",
    emulation: EmulationSpec | None = None,
) -> Runtime:
    """Place a model's weights and return the runtime, which is also a context manager that
    detaches: ``tiering.attach``, which says what the other arguments are.

    ``exact`` divides the budget between a compressed copy of the model in fast memory and the full
    weights, which stream: ``generate`` drafts with the copy, checks a window of tokens in one pass
    over the full weights, and returns the full model's text. ``precision`` or ``epsilon`` are the
    copy's then (default: what calibrated hints predict to be the fastest). "strict" computes tokens
    whose two largest scores nearly tie as plain ``generate`` does, one by one, so that the text is
    the same, token by token.

    Raises also InputError for a model whose text can't be drafted, and without a budget.
    """
    if not exact:
        return attach_tiers(
            model,
            hints,
            budget=budget,
            weights=weights,
            spill_dir=spill_dir,
            look_ahead=look_ahead,
            precision=precision,
            epsilon=epsilon,
            measure=measure,
            device=device,
            machine=machine,
            mode=mode,
            emulation=emulation,
        )
    if exact not in (True, "strict"):
        raise InputError(f"exact {exact!r} is unknown; allowed: False, True, 'strict'")
    if budget is None:
        raise InputError("exact output divides a budget: give one, such as budget={'HBM': ...}")
    if measure is not None:
        raise InputError("measure has no effect with exact, whose text is the full model's")
    check_can_draft(model)
    if exact == "strict":
        check_strict(model)
    common: dict[str, Any] = {
        "weights": weights,
        "machine": machine,
        "mode": mode,
        "emulation": emulation,
        "device": device,
    }
    division = divide(model, hints, budget=budget, precision=precision, epsilon=epsilon, **common)
    draft = Draft(
        model,
        hints,
        division,
        budget={**budget, "HBM": division.draft_limit},
        epsilon=epsilon,
        spill_dir=spill_dir,
        **common,
    )
    if division.full.emulation is None:
        common["machine"] = division.full.machine
    try:
        full = attach_tiers(
            model,
            hints,
            budget=division.budget,
            spill_dir=spill_dir,
            look_ahead=look_ahead,
            known=draft.known_weights() if division.residuals else None,
            **common,
        )
    except BaseException:
        draft.close()
        raise
    return ExactRuntime(full, model, draft, strict=exact == "strict")
