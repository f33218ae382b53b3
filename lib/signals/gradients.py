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

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks import is_sharded, unique_parameters, unwrap_model
from ..blocks.faults import find_fault
from ..errors import InputError
from .summary import causal_logits, check_token_ids, dtype_names, refuse_fsdp1


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
    leaving puts flags, ``requires_grad``, ``.grad`` and torch's global random state back. Peak
    memory above the weights: one gradient of the model and the activations of a batch. Raises
    InputError for weights that have no gradient (quantized, sharded, offloaded).
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
        self._generators: dict[torch.device, torch.Generator] = {}
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
                loss, tokens = self._summed_loss(ids_BT.to(device))
                gradients = torch.autograd.grad(
                    loss, list(self.parameters.values()), allow_unused=True
                )
            del loss
            draw = {
                name: gradient
                for name, gradient in zip(self.parameters, gradients, strict=True)
                if gradient is not None
            }
            for name, gradient in draw.items():
                if not bool(gradient.isfinite().all()):
                    raise FloatingPointError(
                        f"the gradient of {name!r} isn't finite: {_overflow_hint(self.model)}"
                    )
            yield Draw(gradients=draw, tokens=tokens, sequences=len(ids_BT))

    def _summed_loss(self, ids_BT: Tensor) -> tuple[Tensor, int]:
        """Return the loss summed over positions, in nats, and their number."""
        logits = causal_logits(self.model, ids_BT)
        if self.labels is FisherLabels.DATA:
            logits, targets = logits[:, :-1], ids_BT[:, 1:].to(logits.device)
        flat = logits.reshape(-1, logits.shape[-1]).float()
        if not bool(flat.detach().isfinite().all()):
            raise FloatingPointError(
                f"the model's logits aren't finite: {_overflow_hint(self.model)}"
            )
        if self.labels is FisherLabels.SAMPLED:
            if flat.device not in self._generators:
                self._generators[flat.device] = torch.Generator(flat.device).manual_seed(self._seed)
            probabilities = flat.detach().softmax(-1)
            generator = self._generators[flat.device]
            targets = torch.multinomial(probabilities, 1, generator=generator)
        return F.cross_entropy(flat, targets.reshape(-1), reduction="sum"), flat.shape[0]

    def _device_types(self) -> list[str]:
        return sorted({parameter.device.type for parameter in self.parameters.values()})


@contextmanager
def _no_autocast(device_types: list[str]) -> Iterator[None]:
    if not device_types:
        yield
        return
    with torch.autocast(device_types[0], enabled=False), _no_autocast(device_types[1:]):
        yield


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
