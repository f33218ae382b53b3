"""A calibration of requests: each is answered at every tier below full, and measured.

What it is good for, and how bounds come from it, says ``progressive/estimators.py``.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
import xxhash

from ..blocks import parameter_digest
from ..codecs.layout import Codec
from ..errors import InputError
from ..progressive.calibration import Calibration, score_request
from ..progressive.engine import Engine
from ..progressive.estimators import mean_information, predict_damage
from ..progressive.generation import GenerationRequest
from ..progressive.kv_cache import round_trip
from ..progressive.ladder import UNIFORM, make_ladder
from ..progressive.measuring import Measurement
from ..progressive.served import ServedModel
from ..signals.kv import collect_kv_fisher

POLICY = "first tier within epsilon after the prompt; greedy"
"""How a tier is chosen, and tokens."""
_INFORMING = 16
"""Requests that Fisher information is measured on."""
_PRECISIONS = sorted({precision for pair in UNIFORM.values() for precision in pair})
_TOGETHER = 8
"""Answers on their way: the logits of each are kept until it is measured."""


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
    request that is. Raises InputError for no requests, and for those whose prompts are too short
    for a compact page; what fails of a request is raised.
    """
    if not requests:
        raise InputError("no requests to calibrate on: give 59 or more")
    device = next(model.parameters()).device
    prompts = [torch.tensor([list(each.prompt)], device=device) for each in requests]
    found: SimpleQueue[tuple[int, Measurement | Exception]] = SimpleQueue()
    round_trips = {str(p): partial(round_trip, codec=Codec(p)) for p in _PRECISIONS}
    layers = collect_kv_fisher(model, prompts[:_INFORMING], round_trips=round_trips)
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
        below = range(ladder.full)
        measured: list[dict[int, Measurement]] = [{} for _ in requests]
        waiting = [(index, tier) for index in range(len(requests)) for tier in below][::-1]
        done = 0
        while done < len(requests) * len(below):
            while waiting and done + _TOGETHER > len(requests) * len(below) - len(waiting):
                index, tier = waiting.pop()
                engine.measure(requests[index], tier, partial(_put, found, index))
            index, result = found.get()
            if isinstance(result, Exception):
                raise result
            measured[index][result.tier] = result
            done += 1
            if progress is not None and len(measured[index]) == len(below):
                progress(1)
    information = mean_information(layers, served.shape)
    scores = []
    for each in measured:
        predicted = [
            predict_damage(information, each[tier].errors, each[tier].prompt_tokens)
            for tier in below
        ]
        scores.append(score_request([each[tier].mean for tier in below], predicted))
    workload = xxhash.xxh3_64_hexdigest(repr([list(each.prompt) for each in requests]).encode())
    return Calibration(
        keys={**calibration_keys(model), "workload": workload},
        ladder=ladder,
        information=information,
        scores=tuple(scores),
        tokens=tuple(len(each.prompt) for each in requests),
    )


def _put(
    found: SimpleQueue[tuple[int, Measurement | Exception]],
    index: int,
    result: Measurement | Exception,
) -> None:
    found.put((index, result))
