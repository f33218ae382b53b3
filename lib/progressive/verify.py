"""Which tokens the full model would have chosen, and which of a draft's they are.

A token is the one with the largest score, after noise where it is sampled: Gumbel noise that
depends on the seed, the sequence and the token's number alone, added to the processed logits, makes
the largest a sample of their softmax (Gumbel 1954; Maddison et al. 2014, arXiv:1411.0030). The
draft adds the same noise, so it mostly draws the same token (Daliri et al. 2024, arXiv:2408.07978),
and the text is the full model's sample of that seed, whatever the draft.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .generation import GenerationRequest, Token

_PRIME = 1_000_003


@dataclass(frozen=True, slots=True)
class Chooser:
    """Chooses tokens from logits: the largest (``seed`` None), or a sample.

    ``processors``: transformers' logits processors, which see each sequence with its own tokens.
    """

    processors: Any
    seed: int | None

    def by_sequence(self, batch: int) -> list["Chooser"]:
        """Return one for each sequence of a batch: ``generate``'s processors of repetitions know
        how much padding each of a batch has, and are called with one sequence.
        """
        return [replace(self, processors=_of_one(self.processors, n)) for n in range(batch)]

    def scores(self, ids_T: Tensor, logits_V: Tensor) -> Tensor:
        """Return the processed logits (V,) of the token after ``ids_T``, in fp32."""
        logits_1V = logits_V[None].to(torch.float32, copy=True)
        scores_1V: Tensor = self.processors(ids_T[None], logits_1V)
        return scores_1V[0]

    def noisy(self, scores_V: Tensor, *, sequence: int, number: int) -> Tensor:
        """Return the scores (V,) of which the largest is chosen: token ``number`` of a sequence."""
        if self.seed is None:
            return scores_V
        generator = torch.Generator()
        generator.manual_seed(((self.seed * _PRIME + sequence) * _PRIME + number) % 2**63)
        exponential_V = torch.empty(len(scores_V)).exponential_(generator=generator)
        return scores_V - exponential_V.log_().to(scores_V.device)

    def choose(
        self, ids_T: Tensor, logits_V: Tensor, *, sequence: int, number: int
    ) -> tuple[int, Tensor]:
        """Return the token after ``ids_T``, and its processed logits (V,)."""
        scores_V = self.scores(ids_T, logits_V)
        return int(self.noisy(scores_V, sequence=sequence, number=number).argmax()), scores_V


def _of_one(processors: Any, sequence: int) -> Any:
    found = type(processors)()
    for processor in processors:
        ignored = getattr(processor, "prompt_ignore_length", None)
        if isinstance(ignored, Tensor):
            processor = copy.copy(processor)
            processor.prompt_ignore_length = ignored[sequence : sequence + 1]
        found.append(processor)
    return found


@dataclass(frozen=True, slots=True)
class Scored:
    """Rows of logits (T, V) of one request, with what a step computes for all of its rows at once:
    the largest of each, and the logarithm of the sum of exponentials, in fp32.
    """

    logits_TV: Tensor
    largest: Sequence[int]
    normalizers: Sequence[float]

    def __len__(self) -> int:
        return len(self.largest)

    @property
    def are_finite(self) -> bool:
        """Whether a token can be chosen from each row."""
        return all(map(math.isfinite, self.normalizers))

    def describe(self, row: int, token: int, alternatives: int) -> Token:
        """Return a token with its log-probability, and its most likely alternatives'."""
        logits_V, normalizer = self.logits_TV[row], self.normalizers[row]
        top: tuple[tuple[int, float], ...] = ()
        if alternatives:
            values, ids = logits_V.float().topk(min(alternatives, len(logits_V)))
            logprobs = [value - normalizer for value in values.tolist()]
            top = tuple(zip(ids.tolist(), logprobs, strict=True))
        return Token(id=token, logprob=float(logits_V[token]) - normalizer, top=top)


def score(logits_RV: Tensor, counts: Sequence[int]) -> list[Scored]:
    """Return the logits of a step by request; ``counts``: rows of each."""
    scores_RV = logits_RV.float()  # torch finds the largest of bf16 numbers slowly
    largest = scores_RV.argmax(-1).tolist()
    normalizers = scores_RV.logsumexp(-1).tolist()
    found, start = [], 0
    for rows_TV in torch.split(logits_RV, list(counts)):
        end = start + len(rows_TV)
        found.append(Scored(rows_TV, largest[start:end], normalizers[start:end]))
        start = end
    return found


def top_gap(scores_V: Tensor) -> float:
    """Return by how much the largest score is above the second."""
    first, second = scores_V.topk(2).values.tolist()
    return float(first - second)


def divergences_of(full_TV: Tensor, other_TV: Tensor) -> list[float]:
    """Return KL(full || other) of each row of logits, nats."""
    p, q = (logits.float().log_softmax(-1) for logits in (full_TV, other_TV))
    found: list[float] = (p.exp() * (p - q)).sum(-1, dtype=torch.float64).clamp(min=0).tolist()
    return found


def make_chooser(request: GenerationRequest) -> Chooser | None:
    """Return what chooses tokens as a request says; None: the most likely."""
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

    sampling, processors = request.sampling, LogitsProcessorList()
    if sampling.constraint is not None:
        start, constraint = len(request.prompt), sampling.constraint

        def only_allowed(ids: Tensor, scores: Tensor) -> Tensor:
            allowed_V = constraint(ids[0, start:].tolist())
            return scores.masked_fill(~allowed_V, -torch.inf)

        processors.append(only_allowed)
    if sampling.temperature == 0:
        return Chooser(processors, None) if processors else None
    if sampling.temperature != 1:
        processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    return Chooser(processors, sampling.seed)
