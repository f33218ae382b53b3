"""What changing a model costs, measured on text: KL divergence, perplexity, top-1 agreement.

Per position, p of the full model and q of the other one over the whole vocabulary,

    KL(p || q) = sum_y p(y) (log p(y) - log q(y))      in nats per token

That of an 8-bit model is the small difference of large terms, so it isn't computed as one: with d
the difference of the two models' logits and u = d - E_p[d],

    KL(p || q) = log E_p[exp u] - E_p[u] = log1p(E_p[expm1(u) - u] + E_p[u]) - E_p[u]

where every term is of the size of the result. In float32 it has the logits' own rounding for an
error: less than 1e-10 nats, and 1e-5 of a KL above 1e-6. It needs no labels, so every position
counts; the likelihood of the text needs the next token, so all but the last do. Positions of one
sequence depend on each other: intervals come from whole sequences, by the percentile bootstrap
(Efron 1979, doi:10.1214/aos/1176344552). A ratio of two KLs on the same text is resampled as a
pair, since what makes a sequence hard for one makes it hard for the other.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from ..blocks.faults import blaming_weights
from ..errors import InputError
from ..vocabulary import Precision
from .perturb import perturb
from .prefix import ResumableForward

CONFIDENCE = 0.95
_RESAMPLES = 2000
_VALUES_AT_ONCE = 1 << 21
"""Logits compared at a time: 8 MiB, times a few, which caches hold."""
_FAR = 1.0
"""Above E_p[expm1(u)] of this, probabilities too small for float32 may matter: KL is then of a size
at which the difference of large terms is exact enough."""

Forward = Callable[[Tensor], Tensor]
"""Token ids (B, T) -> logits (B, T, V)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """One model against another on the same sequences. Means are over tokens, in nats."""

    kl_nats: float
    kl_interval: tuple[float, float] | None
    """95 % confidence interval of ``kl_nats``; None for a single sequence."""
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


class Reference:
    """The full model's side of a batch, worked out once for all that it is compared with.

    Holds its logits and its probabilities in float32.
    """

    def __init__(self, ids_BT: Tensor, logits_BTV: Tensor) -> None:
        self.ids_BT = ids_BT
        self.nll: list[float] = []
        self._logits_BTV = logits_BTV.float()
        self._top_BT = logits_BTV.argmax(-1)
        self._norm_BT = self._logits_BTV.logsumexp(-1)
        self._p_BTV = torch.empty_like(self._logits_BTV)
        for row, ids_T in enumerate(ids_BT):
            for part in _parts(self._logits_BTV[row]):
                norm_T1 = self._norm_BT[row, part, None]
                torch.sub(self._logits_BTV[row, part], norm_T1, out=self._p_BTV[row, part]).exp_()
            self.nll.append(_nll(self._logits_BTV[row], self._norm_BT[row], ids_T))

    def compare(self, row: int, other_TV: Tensor) -> tuple[float, float, float]:
        """Return mean KL from a sequence of this batch to another model's logits of it, share of
        equal top tokens, and the other's summed negative log-likelihood.
        """
        other_TV = other_TV.float()
        both = [self._diverge(row, part, other_TV[part]) for part in _parts(other_TV)]
        kl_T, norm_T = (torch.cat(values) for values in zip(*both, strict=True))
        kl_nats = kl_T.mean().item()
        if not math.isfinite(kl_nats):
            raise FloatingPointError("the logits aren't finite: the weights overflow in this dtype")
        equal = (self._top_BT[row] == other_TV.argmax(-1)).double().mean().item()
        return kl_nats, equal, _nll(other_TV, norm_T, self.ids_BT[row])

    def _diverge(self, row: int, part: slice, other_TV: Tensor) -> tuple[Tensor, Tensor]:
        """Return KL at some positions, and log sum exp of the other's logits there, in float64."""
        p_TV, norm_T = self._p_BTV[row, part], self._norm_BT[row, part].double()
        shift_TV = other_TV - self._logits_BTV[row, part]
        total_T = p_TV.sum(-1).double()
        mean_T = _dots(p_TV, shift_TV)
        shift_TV.sub_(mean_T[:, None])
        rest_T = _dots(p_TV, shift_TV).double() / total_T
        excess_TV = torch.expm1(shift_TV).sub_(shift_TV)
        growth_T = _dots(p_TV, excess_TV).double() / total_T + rest_T
        gain_T = torch.log1p(growth_T)
        far_T = ~(growth_T < _FAR)  # NaN too
        if bool(far_T.any()):
            norms = other_TV[far_T].logsumexp(-1).double()
            gain_T[far_T] = norms - norm_T[far_T] - mean_T[far_T].double()
        return gain_T - rest_T, norm_T + mean_T.double() + gain_T


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
        self.compare(Reference(ids_BT, reference_BTV), other_BTV)

    def compare(self, reference: Reference, other_BTV: Tensor) -> None:
        """Add a batch whose full model's side is known, as ``add`` does."""
        length = reference.ids_BT.shape[1]
        if self._length not in (None, length):
            raise InputError(
                f"sequences of {length} tokens after ones of {self._length}: cut them to one length"
            )
        self._length = length
        for row, other_TV in enumerate(other_BTV):
            kl_nats, agreement, nll = reference.compare(row, other_TV)
            self._kl.append(kl_nats)
            self._agreement.append(agreement)
            self._reference_nll.append(reference.nll[row])
            self._nll.append(nll)

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


def measure_perturbations(
    model: nn.Module,
    batches: Iterable[Tensor],
    choices: Sequence[Mapping[str, Precision]],
    *,
    progress: Callable[[int], object] | None = None,
) -> list[Quality]:
    """Measure what each choice of precisions (block -> precision, others stay) does to a model.

    ``batches``: token ids (B, T) on the CPU. The full model's side is computed once per batch, a
    pass begins at the first layer that a choice changes (``prefix``), and weights are encoded anew
    for each batch and choice: large batches are the faster. The model must be in evaluation mode,
    and is the same bit for bit afterwards. ``progress`` is called with the number of passes done.
    """
    meters = [QualityMeter() for _ in choices]
    perturbations = Perturbations(model)
    for batch_BT in batches:
        perturbations.begin(batch_BT)
        for meter, choice in zip(meters, choices, strict=True):
            perturbations.compare(choice, meter)
            if progress is not None:
                progress(1)
    return [meter.result() for meter in meters]


class Perturbations:
    """One model against itself with some weights changed, on one batch of tokens after another.

    The model must be in evaluation mode, and is the same bit for bit after each call.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._forward = ResumableForward(model)
        self._reference: Reference | None = None

    @torch.inference_mode()
    def begin(self, batch_BT: Tensor) -> None:
        """Take the next batch, token ids (B, T) on the CPU, and run the full model on it."""
        self._reference = None  # its memory is needed
        ids_BT = batch_BT.to(next(self._model.parameters()).device)
        self._reference = Reference(ids_BT, self._forward.record(ids_BT))

    @torch.inference_mode()
    def compare(self, choice: Mapping[str, Precision], meter: QualityMeter) -> None:
        """Measure what precisions (block -> precision, others stay) do to the batch."""
        assert self._reference is not None, "begin with a batch"
        with perturb(self._model, choice):
            other_BTV = self._forward.logits(choice)
        with blaming_weights(self._model):
            meter.compare(self._reference, other_BTV)


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
    """Return the percentile-bootstrap interval of the mean of independent values; None for one."""
    return bootstrap_statistic([values], lambda means: float(means[0]), confidence=confidence)


def bootstrap_statistic(
    rows: Sequence[Sequence[float]],
    statistic: Callable[[NDArray[np.float64]], float],
    *,
    confidence: float = CONFIDENCE,
) -> tuple[float, float] | None:
    """Return the interval of a statistic of the rows' means; None for single values.

    Column i of every row belongs to the same sequence, and columns are resampled whole.
    """
    sample = np.asarray(rows, dtype=np.float64)
    count = sample.shape[1]
    if count < 2:
        return None
    columns = np.random.default_rng(0).integers(count, size=(_RESAMPLES, count))
    values = [statistic(means) for means in sample[:, columns].mean(-1).T]
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _parts(logits_TV: Tensor) -> list[slice]:
    """Cut positions into parts of a size that caches hold."""
    step = max(1, _VALUES_AT_ONCE // logits_TV.shape[-1])
    return [slice(start, start + step) for start in range(0, len(logits_TV), step)]


def _dots(first_TV: Tensor, second_TV: Tensor) -> Tensor:
    return torch.einsum("tv,tv->t", first_TV, second_TV)


def _nll(logits_TV: Tensor, norm_T: Tensor, ids_T: Tensor) -> float:
    """Return the summed loss of the tokens after the first, given log sum exp of each position."""
    targets_T1 = ids_T[1:, None].to(logits_TV.device)
    likelihoods_T1 = logits_TV[:-1].gather(1, targets_T1)
    return (norm_T[:-1].double() - likelihoods_T1[:, 0]).sum().item()
