"""What changing a model costs, measured on text: KL divergence, perplexity, top-1 agreement.

Per position, p of the full model and q of the other one over the whole vocabulary,

    KL(p || q) = sum_y p(y) (log p(y) - log q(y))      in nats per token

in float64, because that of an 8-bit model is the small difference of large terms. It needs no
labels, so every position counts; the likelihood of the text needs the next token, so all but the
last do. Positions of one sequence depend on each other: intervals come from whole sequences, by the
percentile bootstrap (Efron 1979, doi:10.1214/aos/1176344552).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import InputError
from ..hints import Precision
from ..signals.summary import causal_logits
from .perturb import perturb

CONFIDENCE = 0.95
_RESAMPLES = 2000
_VALUES_AT_ONCE = 1 << 22
"""Logits turned to float64 at a time: 32 MiB, times a few."""

Forward = Callable[[Tensor], Tensor]
"""Token ids (B, T) -> logits (B, T, V)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """One model against another on the same sequences. Means are over tokens, in nats."""

    kl_nats: float
    kl_interval: tuple[float, float] | None
    """95 % confidence interval of ``kl_nats``; None of a single sequence."""
    kl_per_sequence: tuple[float, ...]
    reference_nll: float
    """Mean negative log-likelihood of the text under the full model."""
    nll: float
    top1_agreement: float
    """Share of positions at which both models' most likely token is the same."""
    sequences: int
    tokens: int
    """Positions that KL and agreement were measured at; the likelihood has one per sequence less.
    """

    @property
    def perplexity(self) -> float:
        """Return exp of the mean negative log-likelihood."""
        return perplexity(self.nll)

    @property
    def reference_perplexity(self) -> float:
        """Return the full model's perplexity."""
        return perplexity(self.reference_nll)

    def to_json(self) -> dict[str, Any]:
        """Return the figures without those of single sequences."""
        return {
            "kl_nats": self.kl_nats,
            "kl_interval": None if self.kl_interval is None else list(self.kl_interval),
            "reference_perplexity": self.reference_perplexity,
            "perplexity": self.perplexity,
            "top1_agreement": self.top1_agreement,
            "sequences": self.sequences,
            "tokens": self.tokens,
        }


class QualityMeter:
    """Adds up batch after batch what ``Quality`` reports. All batches have one length."""

    def __init__(self) -> None:
        self._length: int | None = None
        self._kl: list[float] = []
        self._reference_nll: list[float] = []
        self._nll: list[float] = []
        self._agreement: list[float] = []

    def add(self, ids_BT: Tensor, reference_BTV: Tensor, other_BTV: Tensor) -> None:
        """Add a batch: its token ids, and the logits of both models, of any floating dtype.

        Raises InputError for sequences of another length than before, FloatingPointError for logits
        that aren't finite.
        """
        if self._length not in (None, ids_BT.shape[1]):
            raise InputError(
                f"sequences of {ids_BT.shape[1]} tokens after ones of {self._length}: cut them to "
                "one length"
            )
        self._length = ids_BT.shape[1]
        for ids_T, reference_TV, other_TV in zip(ids_BT, reference_BTV, other_BTV, strict=True):
            kl, agreement = _compare(reference_TV, other_TV)
            self._kl.append(kl)
            self._agreement.append(agreement)
            self._reference_nll.append(next_token_nll(reference_TV, ids_T))
            self._nll.append(next_token_nll(other_TV, ids_T))

    def result(self) -> Quality:
        """Return the figures of all batches; InputError if there was none."""
        if not self._kl or self._length is None:
            raise InputError("no text to measure on: give at least one sequence")
        scored = len(self._kl) * max(self._length - 1, 1)
        return Quality(
            kl_nats=float(np.mean(self._kl)),
            kl_interval=bootstrap_interval(self._kl),
            kl_per_sequence=tuple(self._kl),
            reference_nll=sum(self._reference_nll) / scored,
            nll=sum(self._nll) / scored,
            top1_agreement=float(np.mean(self._agreement)),
            sequences=len(self._kl),
            tokens=len(self._kl) * self._length,
        )


@torch.inference_mode()
def compare_models(reference: Forward, other: Forward, batches: Iterable[Tensor]) -> Quality:
    """Compare two models on batches of token ids (B, T); one batch's logits of both are held."""
    meter = QualityMeter()
    for ids_BT in batches:
        meter.add(ids_BT, reference(ids_BT), other(ids_BT))
    return meter.result()


@torch.inference_mode()
def measure_perturbations(
    model: nn.Module,
    batches: Iterable[Tensor],
    choices: Sequence[Mapping[str, Precision]],
    *,
    progress: Callable[[int], object] | None = None,
) -> list[Quality]:
    """Measure what each choice of precisions (block -> precision, others stay) does to a model.

    ``batches``: token ids (B, T) on the CPU. The full model's logits are computed once per batch,
    and weights are encoded anew for each batch and choice: large batches are the faster. The model
    must be in evaluation mode, and is the same bit for bit afterwards. ``progress`` is called with
    the number of forward passes done.
    """
    meters = [QualityMeter() for _ in choices]
    device = next(model.parameters()).device
    for batch_BT in batches:
        ids_BT = batch_BT.to(device)
        reference_BTV = causal_logits(model, ids_BT)
        for meter, choice in zip(meters, choices, strict=True):
            with perturb(model, choice):
                other_BTV = causal_logits(model, ids_BT)
            meter.add(ids_BT, reference_BTV, other_BTV)
            if progress is not None:
                progress(1)
    return [meter.result() for meter in meters]


def next_token_nll(logits_TV: Tensor, ids_T: Tensor) -> float:
    """Return the summed negative log-likelihood of a sequence's tokens after the first, in nats."""
    targets = ids_T[1:].to(logits_TV.device)
    return functional.cross_entropy(logits_TV[:-1].float(), targets, reduction="sum").item()


def perplexity(nll_nats: float) -> float:
    """Return exp of a mean negative log-likelihood; FloatingPointError for NaN or overflow."""
    if not nll_nats < 700:  # exp(700) is near the largest float; NaN compares false
        raise FloatingPointError(
            f"the held-out loss is {nll_nats} nats per token: the weights are broken, or "
            "overflow in this dtype"
        )
    return math.exp(nll_nats)


def bootstrap_interval(
    values: Sequence[float], *, confidence: float = CONFIDENCE
) -> tuple[float, float] | None:
    """Return the percentile-bootstrap interval of the mean of independent values; None of one."""
    if len(values) < 2:
        return None
    sample = np.asarray(values)
    random = np.random.default_rng(0)
    means = [random.choice(sample, len(sample)).mean() for _ in range(_RESAMPLES)]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _compare(reference_TV: Tensor, other_TV: Tensor) -> tuple[float, float]:
    """Return mean KL(reference || other) and share of equal top tokens, over the positions."""
    step = max(1, _VALUES_AT_ONCE // reference_TV.shape[-1])
    kl_nats, equal = 0.0, 0
    parts = zip(torch.split(reference_TV, step), torch.split(other_TV, step), strict=True)
    for reference, other in parts:
        log_p, log_q = (functional.log_softmax(part.double(), -1) for part in (reference, other))
        kl_nats += functional.kl_div(log_q, log_p, reduction="sum", log_target=True).item()
        equal += int((reference.argmax(-1) == other.argmax(-1)).sum())
    if not math.isfinite(kl_nats):
        raise FloatingPointError("the logits aren't finite: the weights overflow in this dtype")
    return kl_nats / len(reference_TV), equal / len(reference_TV)
