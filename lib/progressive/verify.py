"""Which tokens the full model would have chosen, and which of a draft's they are.

A token is the one with the largest score, after noise where it is sampled: Gumbel noise that
depends on the seed, the sequence and the token's number alone, added to the processed logits, makes
the largest a sample of their softmax (Gumbel 1954; Maddison et al. 2014, arXiv:1411.0030). The
draft adds the same noise, so it mostly draws the same token (Daliri et al. 2024, arXiv:2408.07978),
and the text is the full model's sample of that seed, whatever the draft.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_PRIME = 1_000_003


@dataclass(frozen=True, slots=True)
class Chooser:
    """Chooses tokens from logits: the largest (``seed`` None), or a sample.

    ``processors``: transformers' logits processors, which see each sequence with its own tokens.
    """

    processors: Any
    seed: int | None

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


def top_gap(scores_V: Tensor) -> float:
    """Return by how much the largest score is above the second."""
    first, second = scores_V.topk(2).values.tolist()
    return float(first - second)
