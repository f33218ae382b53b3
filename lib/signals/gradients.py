"""Gradients of a causal language model's log-likelihood, draw by draw: what Fisher estimates need.

A draw is one gradient whose square estimates a sum of Fisher diagonals over its tokens (``fisher``
says why, for both kinds of labels): of a whole batch with labels sampled from the model, of a
single sequence with the text's own labels.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType

import numpy as np
import torch
from torch import Tensor, nn

from ..blocks import is_sharded, unique_parameters, unwrap_model
from ..blocks.faults import find_fault
from ..errors import InputError
from .summary import causal_logits, check_token_ids, dtype_names, refuse_fsdp1

_VALUES_AT_ONCE = 1 << 22
"""Probabilities summed up in float64 at a time to sample labels: 32 MiB."""


class FisherLabels(StrEnum):
    """Where the labels of the log-likelihood come from."""

    SAMPLED = "sampled"
    DATA = "data"


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """One gradient of the summed loss in nats. Parameters that it doesn't depend on are absent."""

    gradients: Mapping[str, Tensor]
    tokens: int
    sequences: int


class GradientSampler:
    """Draws gradients of every weight, trained or frozen; a context manager.

    Inside, the model is in evaluation mode (no dropout) and needs gradients of all its parameters;
    leaving puts flags, ``requires_grad``, ``.grad`` and torch's global random state back. Sampled
    labels depend on the seed and on ``number``, that of the next draw, so that a measurement can go
    on where it was left. Peak memory above the weights: one gradient of the
    model and the activations of a batch. Raises InputError for weights that have no gradient
    (quantized, sharded, offloaded).
    """

    def __init__(self, model: nn.Module, *, labels: FisherLabels | str, seed: int = 0) -> None:
        try:
            self.labels = FisherLabels(labels)
        except ValueError as error:
            raise InputError(f"Fisher labels {labels!r}: allowed are sampled, data") from error
        self.model = unwrap_model(model)
        self.parameters = unique_parameters(self.model)
        _check_measurable(self.model, self.parameters)
        self._seed = seed
        self.number = 0
        self._training: list[nn.Module] = []
        self._frozen: list[nn.Parameter] = []

    def __enter__(self) -> "GradientSampler":
        self._training = [module for module in self.model.modules() if module.training]
        self._frozen = [value for value in self.parameters.values() if not value.requires_grad]
        self.model.eval()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        for module in self._training:
            module.training = True

    def draws(self, batch_BT: Tensor) -> Iterator[Draw]:
        """Yield the draws of a batch of token ids without padding, one after another.

        Sampled labels use all T positions and data labels T - 1. Raises InputError for bad tokens
        and FloatingPointError if logits or gradients aren't finite.
        """
        check_batch(batch_BT, self.labels, self.model)
        device = next(iter(self.parameters.values())).device
        whole = self.labels is FisherLabels.SAMPLED
        for ids_BT in torch.split(batch_BT, len(batch_BT) if whole else 1):
            # Not held over the yield: grad mode belongs to the thread, not to this generator.
            with torch.enable_grad(), _no_autocast(self._device_types()):
                logits_BTV = causal_logits(self.model, ids_BT.to(device))
                slopes_BTV, tokens = self._loss_gradient(logits_BTV.detach(), ids_BT)
                gradients = torch.autograd.grad(
                    logits_BTV,
                    list(self.parameters.values()),
                    grad_outputs=slopes_BTV,
                    allow_unused=True,
                )
            del logits_BTV, slopes_BTV
            self.number += 1
            draw = {
                name: gradient
                for name, gradient in zip(self.parameters, gradients, strict=True)
                if gradient is not None
            }
            for name, gradient in draw.items():
                # A sum is fast, and finite only where all are; it may overflow where all are.
                if not bool(gradient.sum().isfinite()) and not bool(gradient.isfinite().all()):
                    raise FloatingPointError(
                        f"the gradient of {name!r} isn't finite: {_overflow_hint(self.model)}"
                    )
            yield Draw(gradients=draw, tokens=tokens, sequences=len(ids_BT))

    def _loss_gradient(self, logits_BTV: Tensor, ids_BT: Tensor) -> tuple[Tensor, int]:
        """Return the gradient by the logits of the loss summed over positions, probabilities minus
        the labels' ones, and the number of positions.
        """
        slopes_BTV = torch.softmax(logits_BTV.float(), -1)
        if not bool(slopes_BTV.sum().isfinite()):
            raise FloatingPointError(
                f"the model's logits aren't finite: {_overflow_hint(self.model)}"
            )
        if self.labels is FisherLabels.DATA:
            slopes_BTV[:, -1] = 0  # nothing follows
            labels_BT1 = ids_BT[:, 1:, None].to(logits_BTV.device)
            scored_BTV = slopes_BTV[:, :-1]
        else:
            generator = self._generator(slopes_BTV.device)
            labels_N1 = sample_labels(slopes_BTV.flatten(0, 1), generator)
            labels_BT1 = labels_N1.view(*slopes_BTV.shape[:2], 1)
            scored_BTV = slopes_BTV
        scored_BTV.scatter_add_(-1, labels_BT1, -torch.ones_like(labels_BT1, dtype=torch.float32))
        return slopes_BTV.to(logits_BTV.dtype), labels_BT1.numel()

    def _generator(self, device: torch.device) -> torch.Generator:
        seed = int(
            np.random.SeedSequence([self._seed, self.number]).generate_state(1, np.uint64)[0]
        )
        return torch.Generator(device).manual_seed(seed >> 1)

    def _device_types(self) -> list[str]:
        return sorted({parameter.device.type for parameter in self.parameters.values()})


@contextmanager
def _no_autocast(device_types: list[str]) -> Iterator[None]:
    if not device_types:
        yield
        return
    with torch.autocast(device_types[0], enabled=False), _no_autocast(device_types[1:]):
        yield


def sample_labels(probabilities_NV: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one label per row (N, 1): where the row's running sum passes a uniform number.

    torch.multinomial takes ten times as long: it draws a number for each probability.
    """
    device = probabilities_NV.device
    uniform_N1 = torch.rand(
        len(probabilities_NV), 1, dtype=torch.float64, device=device, generator=generator
    )
    parts = []
    step = max(1, _VALUES_AT_ONCE // probabilities_NV.shape[1])
    numbers = torch.split(uniform_N1, step)
    for rows_NV, numbers_N1 in zip(torch.split(probabilities_NV, step), numbers, strict=True):
        sums_NV = rows_NV.cumsum(1, dtype=torch.float64)
        # From the right: labels of probability 0 take no part.
        labels_N1 = torch.searchsorted(sums_NV, numbers_N1 * sums_NV[:, -1:], right=True)
        parts.append(labels_N1.clamp_(max=rows_NV.shape[1] - 1))
    return torch.cat(parts)


def _overflow_hint(model: nn.Module) -> str:
    fault = find_fault(model)
    return fault or f"the weights are finite, so {dtype_names(model)} overflows (try float32)"


def check_batch(ids: Tensor, labels: FisherLabels, model: nn.Module) -> None:
    """Raise InputError for token ids that gradients with such labels can't be taken of."""
    check_token_ids(ids, model)
    if labels is FisherLabels.DATA and ids.shape[1] < 2:
        raise InputError(
            "data labels need sequences of at least 2 tokens: nothing follows the first"
        )


def _check_measurable(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    refuse_fsdp1(model)
    for name, parameter in parameters.items():
        if is_sharded(parameter):
            raise InputError(
                f"parameter {name!r} is sharded: save the model and run tierhints collect "
                "on one process"
            )
        if parameter.device.type == "meta":
            raise InputError(f"parameter {name!r} is offloaded (on meta): load the model in memory")
        if not parameter.is_floating_point():
            raise InputError(
                f"parameter {name!r} is quantized ({parameter.dtype}): measure the unquantized "
                "checkpoint"
            )
