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
from ..progressive.division import WIDTHS, predict_acceptance
from ..tiering import attach, plan
from ..tiering.planning.inputs import HintsGiven
from ..tiering.planning.needs import PrecisionChoice
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
    with attach(model, budget={"HBM": None}, weights=weights):
        text = OwnText(model, prompts, new_tokens=new_tokens, seed=seed)
    found: dict[Precision, Acceptance] = {}
    for precision in precisions:
        with attach(model, budget={"HBM": None}, weights=weights, precision=precision):
            found[precision] = text.compare(predict_draft(model, weights, hints, precision))
    return found


class OwnText:
    """What a full model writes behind some prompts, and says of it, to compare its copies with."""

    def __init__(self, model: Any, prompts: Tensor, *, new_tokens: int, seed: int) -> None:
        """Let the model, in full, continue ``prompts``: token ids (N, T) without padding."""
        lasting: dict[str, Any] = {
            "attention_mask": torch.ones_like(prompts),
            "min_new_tokens": new_tokens,
            "max_new_tokens": new_tokens,
        }
        greedy_NT = model.generate(prompts, do_sample=False, **lasting)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            sampled_NT = model.generate(
                prompts, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **lasting
            )
        self._length, self._seed = prompts.shape[1], seed
        self._greedy, self._sampled = FullModel(model, greedy_NT), FullModel(model, sampled_NT)

    def compare(self, predicted: float | None = None) -> Acceptance:
        """Compare the model as it is now; ``predicted`` goes along."""
        length, same, coupled, meter = self._length, [], [], QualityMeter()
        for _, reference_BTV, logits_BTV in self._greedy.side_by_side():
            reference_NV, logits_NV = _after(length, reference_BTV), _after(length, logits_BTV)
            same.append(reference_NV.argmax(-1) == logits_NV.argmax(-1))
        generator = torch.Generator().manual_seed(self._seed)
        for ids_BT, reference_BTV, logits_BTV in self._sampled.side_by_side():
            meter.add(ids_BT, reference_BTV, logits_BTV)
            reference_NV, logits_NV = _after(length, reference_BTV), _after(length, logits_BTV)
            coupled.append(_coupled(reference_NV, logits_NV, generator))
        return Acceptance(
            greedy=_mean(same),
            sampled=_mean(coupled),
            predicted=predicted,
            kl_nats=meter.result().kl_nats,
        )


def predict_draft(
    model: Any, weights: str | Path, hints: HintsGiven, precision: PrecisionChoice
) -> float | None:
    """Return the acceptance that calibrated hints predict of a copy; None without any."""
    if hints is None:
        return None
    planned = plan(model, hints, budget={"HBM": None}, weights=weights, precision=precision)
    nats = planned.veto.to_json(planned.plan)["predicted_nats"]
    return None if nats is None or math.isnan(nats) else predict_acceptance(nats)


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
