"""What kernels cost beyond the weights' own error: KL(weights as stored || the runtime's output).

A block's curve is that of its weights. Kernels round more: activations to 16 bits, and those of a
model in bfloat16 to its eight, as expanded weights on machines that multiply in bfloat16. A
rounding of activations is the same whatever the weights were stored at, so one figure bounds it for
a whole model: the largest over precisions, all blocks together, through the runtime itself. Which
kernel computes depends on the number of activation rows, so both a whole sequence and a few tokens
at a time are measured.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..codecs.expansion import FUSED_INT8_ROWS
from ..codecs.kernels import kernel_name
from ..precision.perturb import curve_precisions, lossy_blocks, perturb
from ..precision.quality import QualityMeter, Reference
from ..precision.remember import Remember, call
from ..signals.summary import causal_logits
from ..tiering import attach
from ..vocabulary import Precision

_SEQUENCES = 8
_LENGTH = 64


def measure_kernels(
    model: Any,
    tokens: Tensor,
    *,
    device: torch.device,
    remember: Remember = call,
    progress: Callable[[int], object] = lambda _: None,
) -> dict[str, Any]:
    """Return the ``kernels`` of hints' quality, on sequences (N, T) and the model in its own dtype.

    ``nats``: the upper end of the largest figure's 95 % interval. ``remember`` keeps that of each
    precision.
    """
    sequences = torch.split(tokens[:_SEQUENCES, :_LENGTH].to(device), 1)
    upper: dict[str, float] = {}
    for precision in curve_precisions(model):
        measure = partial(_measure_precision, model, sequences, precision, device=device)
        upper[str(precision)] = remember(f"kernels at {precision}", measure)
        progress(1)
    return {
        "name": kernel_name(device, next(model.parameters()).dtype),
        "nats": max(upper.values()),
        "by_precision": upper,
    }


@torch.inference_mode()
def _measure_precision(
    model: Any,
    sequences: Sequence[Tensor],
    precision: Precision,
    *,
    device: torch.device,
) -> float:
    """Return the upper end of the larger interval, of whole sequences and of a few tokens."""
    blocks = {block.name: precision for block in lossy_blocks(model, precision)}
    with perturb(model, blocks):
        references = [Reference(ids_1T, causal_logits(model, ids_1T)) for ids_1T in sequences]
    whole, stepwise = QualityMeter(), QualityMeter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of small matrices that stay as they are
        runtime = attach(
            model, budget={"HBM": None, "SSD": None}, precision=precision, device=device
        )
    with runtime:
        for reference in references:
            whole.compare(reference, causal_logits(model, reference.ids_BT))
            stepwise.compare(reference, _stepwise_logits(model, reference.ids_BT))
    qualities = [meter.result() for meter in (whole, stepwise)]
    return max((q.kl_interval or (0, q.kl_nats))[1] for q in qualities)


def _stepwise_logits(model: Any, ids_1T: Tensor) -> Tensor:
    """Return the logits as decoding makes them: few tokens at a time, with a cache. A model that
    keeps none decodes whole sequences.
    """
    parts, cache = [], None
    for ids in torch.split(ids_1T, FUSED_INT8_ROWS, dim=1):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True)
        parts.append(output.logits)
        cache = output.get("past_key_values")
        if cache is None:
            return causal_logits(model, ids_1T)
    return torch.cat(parts, dim=1)
