"""Errors of a model's weights at each precision, worked out once for all that uses them.

Gradients are multiplied by every error in every draw, and encoding takes longer than a backward
pass. So errors are kept, in bfloat16: each rounded by 2^-9 of itself at most, up or down, which
changes a sum over the few thousand weights of a small block by less than 1e-3, over more by less.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..blocks import unique_parameters
from ..signals.summary import sum_elements
from ..vocabulary import Precision
from .perturb import weight_error

KEEP_BYTES = 2**30
"""Errors kept where the caller doesn't know how much memory there is."""
_WEIGHTS_AT_ONCE = 1 << 17
"""Weights multiplied at a time, so that products stay in a cache."""


class WeightErrors:
    """The error of each parameter at each precision, kept as far as ``keep_bytes`` allow; what
    doesn't fit is encoded anew each time.
    """

    def __init__(self, model: nn.Module, *, keep_bytes: int = KEEP_BYTES) -> None:
        self.model = model
        self._keep_bytes = keep_bytes
        self._kept: dict[tuple[str, Precision], Tensor | None] = {}
        self._num_bytes = 0

    def get(self, name: str, precision: Precision) -> Tensor | None:
        """Return decoded minus original weights, in float32 or bfloat16; None: no error."""
        key = (name, precision)
        if key in self._kept:
            return self._kept[key]
        error = weight_error(self.model, name, precision)
        num_bytes = 0 if error is None else 2 * error.numel()
        if self._num_bytes + num_bytes <= self._keep_bytes:
            self._kept[key] = None if error is None else error.bfloat16()
            self._num_bytes += num_bytes
            return self._kept[key]
        return error

    def products(
        self, name: str, gradient: Tensor, precisions: Sequence[Precision], *, per_expert: bool
    ) -> dict[Precision, tuple[Tensor, Tensor]]:
        """Return sum g delta and sum (g delta)^2 of a parameter at each precision that has an
        error, in float64, () or (experts,).
        """
        errors = {precision: self.get(name, precision) for precision in precisions}
        found: dict[Precision, tuple[Tensor, Tensor]] = {}
        for precision, error in errors.items():
            if error is not None:
                found[precision] = _sum_products(error, gradient, per_expert=per_expert)
        return found

    def squares(self, name: str, precision: Precision) -> Tensor:
        """Return the squared errors of a parameter, float32, zeros where it has none."""
        error = self.get(name, precision)
        if error is None:
            parameter = unique_parameters(self.model)[name]
            return torch.zeros_like(parameter, dtype=torch.float32)
        return error.to(torch.float32, copy=True).square_()


def _sum_products(error: Tensor, gradient: Tensor, *, per_expert: bool) -> tuple[Tensor, Tensor]:
    rows = len(gradient) if per_expert else 1
    errors, gradients = error.reshape(rows, -1), gradient.reshape(rows, -1)
    totals = [torch.zeros(rows, dtype=torch.float64) for _ in range(2)]
    step = max(1, _WEIGHTS_AT_ONCE // rows)
    parts = zip(torch.split(errors, step, 1), torch.split(gradients, step, 1), strict=True)
    for error_part, gradient_part in parts:
        product = gradient_part * error_part
        totals[0] += sum_elements(product, per_expert=True)
        totals[1] += sum_elements(product.square_(), per_expert=True)
    if per_expert:
        return totals[0], totals[1]
    return totals[0][0], totals[1][0]
