"""A text in disjoint parts: for gradients, for calibration, and for judging."""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .held_out import HeldOutText

PARTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class TextParts:
    """Three disjoint parts of a text, each (N, T) token ids: gradients are taken on the first,
    predictions are fitted on the second, and nothing but judged on the third.
    """

    fisher: Tensor
    calibration: Tensor
    judging: Tensor
    source: str
    seed: int | None
    """The seed that drew the sequences; the checkpoint's own are taken in their order."""

    @property
    def digest(self) -> str:
        """Identify the tokens and how they are cut, wherever they were read from."""
        digest = hashlib.sha256()
        for part in (self.fisher, self.calibration, self.judging):
            digest.update(f"{tuple(part.shape)};".encode())
            digest.update(part.to(torch.int64).cpu().contiguous().numpy().tobytes())
        return f"sha256:{digest.hexdigest()}"

    def to_json(self) -> dict[str, Any]:
        """Say what was read: the same digest, the same parts."""
        return {
            "source": self.source,
            "digest": self.digest,
            "sequence_length": self.fisher.shape[1],
            "seed": self.seed,
            "fisher_sequences": len(self.fisher),
            "calibration_sequences": len(self.calibration),
            "judging_sequences": len(self.judging),
        }


def cut_parts(text: HeldOutText, *, seed: int | None) -> TextParts:
    """Cut a text in three.

    Sequences take turns: neighbours come from the same documents, and what is calibrated on one
    part holds for another of the same distribution.
    """
    fisher, calibration, judging = (text.tokens[part::PARTS] for part in range(PARTS))
    return TextParts(
        fisher=fisher,
        calibration=calibration,
        judging=judging,
        source=text.source,
        seed=seed,
    )


def vocabulary_size(model: Any) -> int:
    """Return the number of tokens that a causal language model knows."""
    return int(model.config.get_text_config().vocab_size)
