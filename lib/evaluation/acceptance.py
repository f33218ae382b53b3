"""How often a full model would have chosen its compressed copy's token, by width.

Text is the full model's own, as it is when the copy drafts: greedy, and sampled at temperature 1.
At each of its tokens both say what comes next, and choose with the same noise (``progressive``).
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..precision.quality import QualityMeter
from ..progressive.draft import WIDTHS, predict_acceptance
from ..tiering import attach, plan
from ..tiering.planning.inputs import HintsGiven
from ..vocabulary import Precision
from .full_model import FullModel

_DRAWS = 8
"""Times that noise is drawn at each token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceptance:
    """Shares of tokens, in [0, 1], that both choose. ``predicted``: of the sampled ones, by
    calibrated hints; None: there are none. ``kl_nats``: measured on the sampled text.
    """

    greedy: float
    sampled: float
    predicted: float | None
    kl_nats: float

    def to_json(self) -> dict[str, Any]:
        """Return it as a document."""
        return asdict(self)


def measure_acceptance(
    model: Any,
    weights: str | Path,
    prompts: Tensor,
    hints: HintsGiven = None,
    *,
    precisions: Iterable[Precision] = WIDTHS,
    new_tokens: int = 96,
    seed: int = 0,
) -> Mapping[Precision, Acceptance]:
    """Measure the widths of a causal language model: one that ``load(folder)`` has built, and the
    folder as ``weights``. ``prompts``: token ids (N, T) without padding.

    Raises InputError as ``attach`` does.
    """
    length = prompts.shape[1]
    lasting: dict[str, Any] = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
    everything = {"HBM": None}
    with attach(model, budget=everything, weights=weights):
        greedy_NT = model.generate(prompts, do_sample=False, **lasting)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            sampled_NT = model.generate(
                prompts, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **lasting
            )
        full_greedy, full_sampled = FullModel(model, greedy_NT), FullModel(model, sampled_NT)
    found: dict[Precision, Acceptance] = {}
    for precision in precisions:
        with attach(model, budget=everything, weights=weights, precision=precision):
            same = [
                _after(length, reference_BTV).argmax(-1) == _after(length, logits_BTV).argmax(-1)
                for _, reference_BTV, logits_BTV in full_greedy.side_by_side()
            ]
            coupled, meter = [], QualityMeter()
            generator = torch.Generator().manual_seed(seed)
            for ids_BT, reference_BTV, logits_BTV in full_sampled.side_by_side():
                meter.add(ids_BT, reference_BTV, logits_BTV)
                coupled.append(
                    _coupled(_after(length, reference_BTV), _after(length, logits_BTV), generator)
                )
        found[precision] = Acceptance(
            greedy=_mean(same),
            sampled=_mean(coupled),
            predicted=_predict(model, weights, hints, precision),
            kl_nats=meter.result().kl_nats,
        )
    return found


def _after(length: int, logits_BTV: Tensor) -> Tensor:
    """Return the logits of the tokens behind a prompt, of each but the last, (N, V)."""
    return logits_BTV[:, length - 1 : -1].flatten(0, 1).float()


def _coupled(reference_NV: Tensor, logits_NV: Tensor, generator: torch.Generator) -> Tensor:
    """Return for each token the share of draws in which both choose the same."""
    same = []
    for _ in range(_DRAWS):
        noise_NV = torch.empty_like(reference_NV).exponential_(generator=generator).log_()
        same.append((reference_NV - noise_NV).argmax(-1) == (logits_NV - noise_NV).argmax(-1))
    return torch.stack(same).float().mean(0)


def _mean(shares: list[Tensor]) -> float:
    return float(torch.cat(shares).float().mean())


def _predict(
    model: Any, weights: str | Path, hints: HintsGiven, precision: Precision
) -> float | None:
    if hints is None:
        return None
    planned = plan(model, hints, budget={"HBM": None}, weights=weights, precision=precision)
    nats = planned.veto.to_json(planned.plan)["predicted_nats"]
    return None if nats is None or math.isnan(nats) else predict_acceptance(nats)
