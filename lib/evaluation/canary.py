"""The canary: KL of the model as it runs, on a few held-out sequences of its own.

A plan under a quality bound stands only once their upper bound is within it, and they are measured
again while the model works: predictions are of the weights, a measurement is of everything.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..policy.veto import Measured
from ..tiering import Runtime
from .forwards import ForwardBench

CANARY_SEQUENCES = 16


class Canary:
    """Measures against the model as it is when this is made: before it is attached.

    ``every``: measure again after every so many passes (``after_pass``); None: only when asked to.
    """

    def __init__(
        self,
        model: nn.Module,
        tokens: Tensor,
        folder: Path,
        *,
        batch_size: int,
        every: int | None,
        device: torch.device,
    ) -> None:
        """Write the full model's logits of the last of the ``tokens`` (sequences, length) to a
        folder.
        """
        tokens = tokens[-CANARY_SEQUENCES:]
        self._bench = ForwardBench(
            model,
            tokens,
            batch_size=batch_size,
            warmup=0,
            device=device,
            progress=False,
        )
        self._num_sequences = len(tokens)
        self._folder = folder
        self._every = every
        self._values: list[Measured] = []
        folder.mkdir()
        self._bench.save_reference(folder)

    def measure(self) -> Measured:
        """Measure the model as it is now."""
        quality = self._bench.compare_reference(self._folder)
        upper = quality.kl_nats if quality.kl_interval is None else quality.kl_interval[1]
        self._values.append(Measured(kl_nats=quality.kl_nats, upper_nats=upper))
        return self._values[-1]

    def after_pass(self, runtime: Runtime, num_passes: int) -> None:
        """Measure if it is time to, and let the runtime hold the model more precisely."""
        if self._every is not None and num_passes % self._every == 0:
            runtime.check_quality(self.measure)

    def to_json(self, runtime: Runtime) -> dict[str, Any]:
        """Return what was measured, in nats per token, and how often that raised floors."""
        return {
            "every": self._every,
            "sequences": self._num_sequences,
            "measured": [[value.kl_nats, value.upper_nats] for value in self._values],
            "floors_raised": runtime.veto.num_raised,
        }
