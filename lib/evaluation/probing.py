"""True KL of changed models on a text, choice by choice and batch by batch, kept as it is found."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..precision.quality import Perturbations, QualityMeter
from ..precision.racing import Measure
from ..precision.remember import Remember
from ..progress import progress_bar
from ..vocabulary import Precision
from .predictions import sequences_at_once


class Probing:
    """A model and the sequences (N, T) that its changes are measured on, in random order.

    The full model's side of a batch is computed when something is compared with it, and held until
    the next batch.
    """

    def __init__(
        self, model: nn.Module, tokens: Tensor, *, vocab_size: int, seed: int, remember: Remember
    ) -> None:
        order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))
        self._tokens = tokens[order]
        self._step = sequences_at_once(tokens, vocab_size)
        self._perturbations = Perturbations(model)
        self._begun: tuple[int, int] | None = None
        self._remember = remember

    @property
    def total(self) -> int:
        """The number of sequences."""
        return len(self._tokens)

    def measure(self, kind: str, choices: Sequence[Mapping[str, Precision]]) -> Measure:
        """Return what a race calls to measure choices of one kind ("pair", "plan")."""

        def measure(indices: Sequence[int], start: int, end: int) -> list[list[float]]:
            found: list[list[float]] = [[] for _ in indices]
            batches = [(s, min(s + self._step, end)) for s in range(start, end, self._step)]
            name = f"{len(indices)} {kind}s, sequences {start + 1} to {end} of {self.total}"
            with progress_bar(len(indices) * len(batches), name) as bar:
                for batch in batches:
                    for row, index in zip(found, indices, strict=True):
                        step = f"{kind} {index} sequences {batch[0]} to {batch[1]}"
                        row += self._remember(step, partial(self._compare, batch, choices[index]))
                        bar.update(1)
            return found

        return measure

    def _compare(self, batch: tuple[int, int], choice: Mapping[str, Precision]) -> list[float]:
        """Return the KL of each sequence of a batch."""
        if batch != self._begun:
            self._begun = None
            self._perturbations.begin(self._tokens[slice(*batch)])
            self._begun = batch
        meter = QualityMeter()
        self._perturbations.compare(choice, meter)
        return list(meter.result().kl_per_sequence)
