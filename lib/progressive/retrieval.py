"""Answers over retrieved chunks, with no more of them in the context than the answer needs.

Tiers are shares of the chunks, the most relevant of them, in the order in which they came; the last
is all. An answer is drafted at a tier, and one pass over the full context gives KL(full || drafted
with) of each of its tokens. The longest beginning whose mean is within the bound stays, and what
follows it is drafted at the next tier; with all chunks there is nothing to check. So the mean over
the whole answer is within the bound, always: delta is 0. The full context has to be read for that,
in one pass; what is saved is what stays in fast memory, and is attended to, at each token.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .bounds import Kind, Metric, QualityBound

SHARES = (0.125, 0.25, 0.5, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What a question is asked about: ``opening``, chunks, ``question``, each as token ids."""

    chunks: Sequence[Sequence[int]]
    """As they follow each other."""
    relevance: Sequence[float]
    """Of each chunk: any scores."""
    question: Sequence[int]
    opening: Sequence[int] = ()

    def __post_init__(self) -> None:
        if len(self.chunks) != len(self.relevance) or not self.question:
            raise InputError(
                f"{len(self.chunks)} chunks, {len(self.relevance)} relevances and a question of "
                f"{len(self.question)} tokens: give as many of both, and 1 token or more"
            )

    def tokens(self, share: float) -> list[int]:
        """Return the prompt with a share of the chunks, rounded up; ties keep the earlier one."""
        count = math.ceil(share * len(self.chunks))
        order = sorted(range(len(self.chunks)), key=lambda chunk: -self.relevance[chunk])
        kept = [token for chunk in sorted(order[:count]) for token in self.chunks[chunk]]
        return [*self.opening, *kept, *self.question]


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievedAnswer:
    """An answer, and what it is known to have."""

    tokens: tuple[int, ...]
    """Its end included, where it has one."""
    share: float
    """Of the chunks: the tier that the answer ended at."""
    kl: tuple[float, ...]
    """KL(full || answered with) of each token, nats; 0 where all chunks were there."""
    kind: Kind
    escalations: int
    context_tokens: int
    """Of the prompt that the answer ended with."""
    full_tokens: int
    """Of the prompt with all chunks."""
    drafted: int
    """Tokens drafted in all: those that are not in the answer were taken back."""

    @property
    def mean_kl(self) -> float:
        """Mean over the answer's tokens: at most the bound's epsilon."""
        return _mean(self.kl)


def answer(
    model: Any,
    context: Context,
    bound: QualityBound,
    *,
    max_new_tokens: int,
    end_ids: frozenset[int] = frozenset(),
    shares: Sequence[float] = SHARES,
) -> RetrievedAnswer:
    """Answer greedily by a causal model of ``transformers``, verified by the full context.

    Raises InputError for a bound that leaves something to chance, for no new tokens, and for shares
    that don't rise to 1.
    """
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}: give 1 or more")
    if bound.delta:
        raise InputError(f"delta is {bound.delta}: retrieval is verified, give a bound of delta 0")
    if list(shares) != sorted(set(shares)) or shares[0] <= 0 or shares[-1] != 1:
        raise InputError(f"shares {list(shares)}: give rising ones above 0, the last of them 1")
    full = context.tokens(1)
    kept: list[int] = []
    kl: list[float] = []
    drafted = 0
    for share in shares:
        prompt = context.tokens(share)
        left = max_new_tokens - len(kept)
        new, log_probs_TV = _draft(model, prompt + kept, left, end_ids)
        drafted += len(new)
        if share < 1:
            within = _check(model, full + kept, new, log_probs_TV, bound, kl)
        else:
            within = [0.0] * len(new)
        kl += within
        kept += new[: len(within)]
        if len(kept) == max_new_tokens or (kept and kept[-1] in end_ids):
            break
    return RetrievedAnswer(
        tokens=tuple(kept),
        share=share,
        kl=tuple(kl),
        kind=Kind.VERIFIED if share < 1 or any(kl) else Kind.FULL,
        escalations=shares.index(share),
        context_tokens=len(prompt),
        full_tokens=len(full),
        drafted=drafted,
    )


@torch.inference_mode()
def _draft(
    model: Any, prompt: list[int], count: int, end_ids: frozenset[int]
) -> tuple[list[int], Tensor]:
    """Return greedy tokens, and the log-probabilities (T, V) that each was chosen from."""
    ids_1T = torch.tensor([prompt], device=model.device)
    tokens: list[int] = []
    cache, rows = None, []
    while len(tokens) < count and not (tokens and tokens[-1] in end_ids):
        output = model(input_ids=ids_1T, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        rows.append(output.logits[0, -1].double().log_softmax(-1))
        tokens.append(int(rows[-1].argmax()))
        ids_1T = ids_1T.new_tensor([tokens[-1:]])
    return tokens, torch.stack(rows)


@torch.inference_mode()
def _check(
    model: Any,
    prompt: list[int],
    new: list[int],
    drafted_TV: Tensor,
    bound: QualityBound,
    before: list[float],
) -> list[float]:
    """Return the KL of each token of the longest beginning that is within the bound, with the KL of
    the tokens ``before`` it.
    """
    ids_1T = torch.tensor([prompt + new[:-1]], device=model.device)
    logits_TV = model(input_ids=ids_1T, use_cache=False, logits_to_keep=len(new)).logits[0]
    full_TV = logits_TV.double().log_softmax(-1)
    kl_T = (full_TV.exp() * (full_TV - drafted_TV)).sum(-1).clamp(min=0).tolist()
    if bound.metric is Metric.EXACT:
        same_T = full_TV.argmax(-1) == torch.tensor(new, device=model.device)
        return list(kl_T[: int(same_T.long().cumprod(0).sum())])
    counts = (
        count
        for count in range(len(new), 0, -1)
        if _mean([*before, *kl_T[:count]]) <= bound.epsilon
    )
    return list(kl_T[: next(counts, 0)])


def _mean(kl: Sequence[float]) -> float:
    return math.fsum(kl) / len(kl)
