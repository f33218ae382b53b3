"""The canary: KL of the model as it runs, on a few held-out sequences of its own.

A plan under a quality bound stands only once their upper bound is within it, and they are measured
again while the model works: predictions are of the weights, a measurement is of everything.
"""

import torch
from torch import Tensor, nn

from ..policy.veto import Measured
from .full_model import FullModel

CANARY_SEQUENCES = 16
"""Enough for a bound, and few enough to measure while a model works."""


class Canary:
    """Measures a model against what it was when this was made, each time that it is called."""

    def __init__(self, full: FullModel, device: torch.device | str | None) -> None:
        self._full = full
        self._device = device
        self.measured: list[Measured] = []
        """All that it has measured, in order."""

    @property
    def num_sequences(self) -> int:
        """The sequences that each measurement runs."""
        return self._full.num_sequences

    def __call__(self) -> Measured:
        """Measure the model as it is now: mean KL, and the upper end of its 95 % interval."""
        quality = self._full.compare(self._device)
        upper = quality.kl_nats if quality.kl_interval is None else quality.kl_interval[1]
        self.measured.append(Measured(kl_nats=quality.kl_nats, upper_nats=upper))
        return self.measured[-1]


def measure_kl(
    model: nn.Module,
    tokens: Tensor,
    *,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
) -> Canary:
    """Return a ``measure`` for ``attach`` and ``Runtime.check_quality``; call this before attach.

    ``tokens``: held-out text that hints were not calibrated on, integer ids (N, T) without padding;
    16 sequences are enough, and each measurement runs all of them. ``batch_size``: sequences per
    forward pass (default: by memory). ``device``: attach's, where it has one.

    The model, in evaluation mode, is run once here; its logits stay in the temporary folder as long
    as what is returned. Raises InputError for tokens that aren't the model's.
    """
    return Canary(FullModel(model, tokens, batch_size=batch_size), device)
