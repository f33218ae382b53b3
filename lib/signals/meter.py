"""Hooks that measure what scales Adam's moment in each optimizer step of a foreign loop.

- Tokens: a forward pre-hook counts the labels of each micro-batch, and notes the weight that the
  loss gives each of them.
- Clipping multiplies every gradient by the same coefficient, so the ratio of a few small gradients
  before it (hooks after gradient accumulation) and after it (when ``measure`` is called) *is* the
  coefficient. Under DDP the "before" is averaged over the ranks first, as DDP does.

The loop is that of the Hugging Face Trainer; ``callback`` connects them. The hooks run inside its
forward and backward passes, so that nothing in them may raise: what fails counts as unknown.
"""

import math
import sys
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import unique_parameters
from ..errors import InputError

_NUM_PROBES = 8
"""Parameters whose gradients show the clipping; the smallest, so that copies cost nothing."""


class UpdateMeter:
    """Measures tokens averaged and clip coefficient of one optimizer step after another.

    ``global_items``: whether the model's ``num_items_in_batch`` counts the tokens of all processes.
    ``clips``: whether the loop clips gradients at all. The owner counts ``micro_batches`` and calls
    ``measure`` between clipping and the optimizer's step.
    """

    def __init__(
        self, model: nn.Module, *, world_size: int, global_items: bool, clips: bool
    ) -> None:
        self.micro_batches = 0
        self._world_size = world_size
        self._global_items = global_items
        self._clips = clips
        self._calls: list[tuple[Tensor, Tensor | float | None] | None] = []
        self._raw: dict[int, Tensor] = {}
        self._probes = _pick_probes(model) if clips else []
        # Under torch.compile the counting would break the graph at every label count.
        count_labels: Any = torch.compiler.disable(self._count_labels)  # type: ignore[no-untyped-call]
        self._hooks: list[Any] = [model.register_forward_pre_hook(count_labels, with_kwargs=True)]
        for probe in self._probes:
            hook = probe.register_post_accumulate_grad_hook(self._keep_raw)  # type: ignore[no-untyped-call]
            self._hooks.append(hook)

    def remove(self) -> None:
        """Take the hooks out again."""
        for hook in self._hooks:
            hook.remove()
        self.reset()

    def reset(self) -> None:
        """Forget the micro-batches of the current update."""
        self.micro_batches = 0
        self._calls.clear()
        self._raw.clear()

    def measure(self) -> tuple[float | None, float | None]:
        """Return (tokens, clip coefficient) of the finished update; collective under DDP."""
        device = self._probes[0].device if self._probes else _collective_device()
        try:
            inverse_tokens = self._inverse_tokens()
            raw = _flatten(
                (self._raw.get(id(p), torch.zeros_like(p)) for p in self._probes), device
            )
            clipped = _flatten(
                (torch.zeros_like(p) if p.grad is None else p.grad for p in self._probes), device
            )
        except Exception as error:  # the other ranks wait in the collective below
            warn_safely(f"an update could not be measured: {explain(error)}")
            inverse_tokens = math.nan
            raw = clipped = torch.zeros(sum(p.numel() for p in self._probes), device=device)
        self.reset()
        if self._world_size > 1:
            # One small collective per step; every rank gets here, also one that could not count.
            shared = torch.cat([torch.tensor([inverse_tokens], device=device), raw])
            torch.distributed.all_reduce(shared)
            inverse_tokens, raw = shared[0].item(), shared[1:] / self._world_size
        tokens = None
        if math.isfinite(inverse_tokens) and inverse_tokens > 0:
            tokens = 1 / inverse_tokens
        if not self._clips:
            return tokens, 1.0
        before, after = raw.norm().item(), clipped.norm().item()
        if not (math.isfinite(before) and before > 0 and 0 < after <= before * 1.001):
            return tokens, None
        return tokens, min(1.0, after / before)

    def _count_labels(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if not (model.training and torch.is_grad_enabled()):
            return
        labels = kwargs.get("labels")
        try:
            targets = kwargs.get("shift_labels", None if labels is None else labels[..., 1:])
            if labels is None or targets is None:
                self._calls.append(None)
            else:
                self._calls.append((targets.ne(-100).sum(), kwargs.get("num_items_in_batch")))
        except Exception as error:  # the model itself may make sense of such labels
            self._calls.append(None)
            warn_safely(f"labels of {type(labels).__name__} can't be counted: {explain(error)}")

    def _keep_raw(self, parameter: Tensor) -> None:
        try:
            if parameter.grad is not None:
                self._raw[id(parameter)] = parameter.grad.detach().clone()
        except Exception as error:
            self._calls.append(None)  # without it the coefficient would be another
            warn_safely(f"a gradient could not be kept for comparison: {explain(error)}")

    def _inverse_tokens(self) -> float:
        """Return this process's part of 1 / B, NaN if unknown.

        A gradient sum_k a_k sum_t g_t over micro-batches k of n_k tokens has variance F sum_k a_k^2
        n_k, so 1 / B is that sum. The Trainer's a_k is 1 / (tokens of the whole update), or, for
        models that don't take that number, the mean over the micro-batch divided by their count;
        averaging over the processes divides it once more unless the number is global.
        """
        if len(self._calls) != self.micro_batches:
            return math.nan
        inverse = 0.0
        for call in self._calls:
            if call is None or int(call[0]) == 0:
                return math.nan
            count, items = int(call[0]), call[1]
            if items is None:
                weight = 1 / (self.micro_batches * count * self._world_size)
            else:
                weight = 1 / float(items) / (1 if self._global_items else self._world_size)
            inverse += weight**2 * count
        return inverse


def explain(error: Exception) -> str:
    """Return what an error says, with its class unless it is our own."""
    return str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"


def warn_safely(message: str) -> None:
    """Warn, also where warnings are errors: those would end the user's training run."""
    try:
        warnings.warn(message, stacklevel=3)
    except UserWarning:
        print(f"warning: {message}", file=sys.stderr)


def add_over_processes(tensor: Tensor) -> Tensor:
    """Return a tensor's sum over all processes, if there are several; each must then call it."""
    if not torch.distributed.is_initialized():
        return tensor
    total = tensor.to(_collective_device(), copy=True)
    torch.distributed.all_reduce(total)
    return total


def _pick_probes(model: nn.Module) -> list[nn.Parameter]:
    """Return the smallest trained parameters, the last of equals (LoRA's first start at 0)."""
    trained = [p for p in unique_parameters(model).values() if p.requires_grad]
    return sorted(reversed(trained), key=lambda p: p.numel())[:_NUM_PROBES]


def _flatten(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    parts = [tensor.detach().flatten().to(device, torch.float32) for tensor in tensors]
    return torch.cat(parts) if parts else torch.zeros(0, device=device)


def _collective_device() -> torch.device:
    """Return where the process group wants tensors: NCCL takes only those of its GPU."""
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
