"""A calibration of requests: each is answered at every tier below full, and measured.

What it is good for, and how bounds come from it, says ``progressive/estimators.py``.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash

from ..blocks import parameter_digest
from ..errors import InputError
from ..progressive.calibration import Calibration
from ..progressive.engine import Engine
from ..progressive.estimators import mean_information
from ..progressive.generation import GenerationRequest
from ..progressive.kv.formats import round_trip_pages
from ..progressive.ladder import UNIFORM, make_ladder
from ..progressive.served import ServedModel
from ..signals.kv import KvLayer, collect_kv_fisher
from .measured_requests import make_calibration, measure_requests

POLICY = "first tier within epsilon after the prompt; greedy"
"""How a tier is chosen, and tokens."""
_INFORMING = 16
"""Requests that Fisher information is measured on."""
_PRECISIONS = sorted({precision for pair in UNIFORM.values() for precision in pair})
_TOGETHER = 16
"""Answers on their way: the logits of each are on disk until it is measured."""


def calibration_keys(model: Any) -> dict[str, str]:
    """Return what a calibration has to be of, to be valid for a model; the workload aside, which
    nobody can check.
    """
    return {"model": parameter_digest(model), "codec": "records 2", "policy": POLICY}


def calibrate_requests(
    model: Any,
    requests: Sequence[GenerationRequest],
    *,
    kv_budget: int,
    tiers: str | None = None,
    folder: Path | None = None,
    context: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Calibration:
    """Answer requests greedily at every tier below full, and return what bounds of like ones take.

    At the bytes of each tier layers get the bits that cost least by their Fisher information.
    ``tiers``: names of those to measure; default: all. ``progress`` is called with 1 for each
    answer that is. Raises InputError for no requests, and for those whose prompts are too short
    for a compact page; what fails of a request is raised.
    """
    if not requests:
        raise InputError("no requests to calibrate on: give 59 or more")
    device = next(model.parameters()).device
    prompts = [torch.tensor([list(each.prompt)], device=device) for each in requests]
    layers = measure_damage(model, prompts[:_INFORMING])
    served = ServedModel(model, context)
    served.close()
    ladder = make_ladder(served.shape, damage=layers)
    if tiers is not None:
        ladder = ladder.restrict(tiers)
    with Engine(
        model,
        kv_budget=kv_budget,
        ladder=ladder,
        folder=folder,
        context=context,
    ) as engine:
        rows = measure_requests(engine, requests, ladder.full, at_once=_TOGETHER, progress=progress)
    workload = xxhash.xxh3_64_hexdigest(repr([list(each.prompt) for each in requests]).encode())
    return make_calibration(
        rows,
        keys={**calibration_keys(model), "workload": workload},
        ladder=ladder,
        information=mean_information(layers, served.shape),
    )


def measure_damage(model: Any, prompts: Sequence[torch.Tensor]) -> tuple[KvLayer, ...]:
    """Return what pages of keys, and of values, at each precision of a tier would cost each layer,
    by its Fisher information on prompts (1, T).
    """
    pages = partial(round_trip_pages, are_keys=True), partial(round_trip_pages, are_keys=False)
    round_trips = {
        str(precision): (
            partial(pages[0], precision=precision),
            partial(pages[1], precision=precision),
        )
        for precision in _PRECISIONS
    }
    return collect_kv_fisher(model, prompts, round_trips=round_trips)
