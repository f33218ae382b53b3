"""Beam search whose result says whether it is the most probable text of all: the exact MAP.

A text is finished when a token of ``end_ids`` ends it, or at its full length. A longer text is
never more probable than its beginning, so a finished one whose log-probability is at least that of
everything that was pruned, or is still open, can't be surpassed (Meister, Vieira & Cotterell, TACL
2020, arXiv:2007.03909). Where that doesn't hold the beam is widened: the ladder's tiers are widths,
and memory goes in proportion to them. There is no normalisation by length: it would break the
argument.

How far the best text is ahead of the second best of the same beam says nothing: what was pruned may
surpass both (docs/progressive_workloads.md has the counterexample).

It is exact for the log-probabilities as computed: fp32 logits of a batch differ in their last
digits from those of another.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import InputError

WIDTHS = (1, 2, 4, 8, 16, 32)


class Scorer(Protocol):
    """What gives the log-probabilities of next tokens, float64, none above 0."""

    def start(self, prompt: Sequence[int]) -> Tensor:
        """Begin anew; return those of the token after the prompt, (V,)."""

    def advance(self, parents_B: Tensor, tokens_B: Tensor) -> Tensor:
        """Go on with some of the rows of the last call, each with a token; return (B, V)."""


class CausalScorer:
    """A causal language model of ``transformers``, with a cache."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache: Any = None

    def start(self, prompt: Sequence[int]) -> Tensor:
        """Read the prompt."""
        self._cache = None
        return self._read(torch.tensor([prompt]))[0]

    def advance(self, parents_B: Tensor, tokens_B: Tensor) -> Tensor:
        """Read a token of each row."""
        self._cache.batch_select_indices(parents_B.to(self._model.device))
        return self._read(tokens_B[:, None])

    @torch.inference_mode()
    def _read(self, ids_BT: Tensor) -> Tensor:
        ids_BT = ids_BT.to(self._model.device)
        output = self._model(
            input_ids=ids_BT, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        self._cache = output.past_key_values
        logits: Tensor = output.logits[:, -1]
        return logits.double().log_softmax(-1).cpu()


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamResult:
    """The most probable finished text that was found, and what is known of it."""

    tokens: tuple[int, ...]
    """Its end included, where it has one."""
    log_probability: float
    rest: float
    """The largest log-probability of what was pruned: no other text can have a larger one."""
    width: int
    escalations: int
    """How often the beam was widened."""
    steps: int
    """Forwards of the model, of all widths, with one row or more each."""
    rows: int
    """Rows of those forwards: what they cost."""

    @property
    def certified(self) -> bool:
        """Whether no text is more probable."""
        return self.log_probability >= self.rest


def search(
    scorer: Scorer,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    end_ids: frozenset[int] = frozenset(),
    widths: Sequence[int] = WIDTHS,
) -> BeamResult:
    """Search with each width in turn until the result is certified, or the last was tried.

    Raises InputError for an empty prompt, no new tokens, and widths that don't rise from 1 or more.
    """
    if not prompt or max_new_tokens < 1:
        raise InputError(
            f"prompt of {len(prompt)} tokens, {max_new_tokens} new ones: give 1 or more of each"
        )
    if not widths or widths[0] < 1 or list(widths) != sorted(set(widths)):
        raise InputError(f"widths {list(widths)}: give one or more, rising, from 1")
    best, steps, rows = None, 0, 0
    for escalations, width in enumerate(widths):
        found = _search_once(scorer, prompt, max_new_tokens, end_ids, width)
        steps, rows = steps + found.steps, rows + found.rows
        if best is None or found.log_probability > best.log_probability:
            best = found
        best = replace(
            best, width=width, escalations=escalations, steps=steps, rows=rows, rest=found.rest
        )
        if best.certified:
            break
    assert best is not None
    return best


def _search_once(
    scorer: Scorer, prompt: Sequence[int], length: int, end_ids: frozenset[int], width: int
) -> BeamResult:
    ends = torch.tensor(sorted(end_ids), dtype=torch.int64)
    texts: list[tuple[int, ...]] = [()]
    scores_B = torch.zeros(1, dtype=torch.float64)
    best: tuple[int, ...] = ()
    best_score = rest = -torch.inf
    log_probs_BV = scorer.start(prompt)[None]
    steps = rows = 1
    for place in range(length):
        totals_BV = scores_B[:, None] + log_probs_BV
        closing_BV = totals_BV if place == length - 1 else totals_BV[:, ends]
        if closing_BV.numel() and float(closing_BV.max()) > best_score:
            row, column = divmod(int(closing_BV.argmax()), closing_BV.shape[1])
            token = column if place == length - 1 else int(ends[column])
            best, best_score = (*texts[row], token), float(closing_BV.max())
        if place == length - 1:
            break
        totals_BV[:, ends] = -torch.inf
        found = totals_BV.flatten().topk(min(width + 1, totals_BV.numel()))
        if len(found.values) > width:
            rest = max(rest, float(found.values[width]))
        alive = found.values[:width] > best_score  # the others can't surpass it
        scores_B, chosen = found.values[:width][alive], found.indices[:width][alive]
        if not len(chosen):
            break
        parents, tokens = chosen // totals_BV.shape[1], chosen % totals_BV.shape[1]
        pairs = zip(parents.tolist(), tokens.tolist(), strict=True)
        texts = [(*texts[parent], token) for parent, token in pairs]
        log_probs_BV = scorer.advance(parents, tokens)
        steps, rows = steps + 1, rows + len(texts)
    return BeamResult(
        tokens=best,
        log_probability=best_score,
        rest=rest,
        width=width,
        escalations=0,
        steps=steps,
        rows=rows,
    )
