"""What the signals share: sums per block, a model's identity, and the hints made of both.

A signal is summed inside each parameter (per expert where experts are packed) before anything is
gathered or stored, so that memory stays that of one parameter whatever the size of the model.
Models are called in one way, as causal language models on token ids.
"""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..blocks import Block, select_piece, unique_parameters, unwrap_model
from ..blocks import parameter_digest as digest_model
from ..errors import InputError
from ..hints import Hints, ModelInfo, build_hints
from ..units import parse_thresholds

SignalValue = float | Sequence[float]
"""One number of a block, or one per head."""


def packed_parameters(blocks: Iterable[Block]) -> frozenset[str]:
    """Return the names of parameters that hold one expert per index of dimension 0."""
    return frozenset(
        piece.parameter for block in blocks for piece in block.pieces if piece.expert is not None
    )


def sum_elements(values: Tensor, *, per_expert: bool) -> Tensor:
    """Sum a parameter's elements in float32 or better: float64 on the CPU, () or (experts,)."""
    dtype = torch.promote_types(values.dtype, torch.float32)
    sums = values.flatten(1).sum(1, dtype=dtype) if per_expert else values.sum(dtype=dtype)
    return sums.detach().cpu().double()


def block_masses(blocks: Iterable[Block], sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Add up sums from ``sum_elements`` per block; parameters without one add nothing."""
    return {
        block.name: sum(
            float(select_piece(sums[piece.parameter], piece))
            for piece in block.pieces
            if piece.parameter in sums
        )
        for block in blocks
    }


def ratio_stderr(values: Sequence[float], tokens: Sequence[int]) -> float:
    """Return the standard error of sum(values) / sum(tokens) over independent draws (linearised);
    infinite of a single draw.
    """
    count, total = len(values), sum(tokens)
    if count < 2:
        return math.inf
    mean = sum(values) / total
    squares = sum(
        (value - mean * number) ** 2 for value, number in zip(values, tokens, strict=True)
    )
    return math.sqrt(count / (count - 1) * squares) / total


def refuse_fsdp1(model: nn.Module) -> None:
    """Refuse FSDP1, whose parameters and moments are flat buffers without block structure."""
    for module in model.modules():
        if isinstance(module, _fsdp_classes("FullyShardedDataParallel")):
            raise InputError(
                "the model is wrapped by FSDP1 (FullyShardedDataParallel), whose flat parameters "
                "have no block "
                "structure: use FSDP2 (fully_shard)"
            )


def reshard(model: nn.Module) -> None:
    """Give back the whole parameters that FSDP2's root keeps after a forward without a backward.

    Until then the model names them in place of the sharded ones that the optimizer knows.
    """
    for module in model.modules():
        if isinstance(module, _fsdp_classes("FSDPModule")):
            cast(Any, module).reshard()


def make_hints(
    model: nn.Module,
    blocks: Sequence[Block],
    *,
    model_id: str,
    revision: str,
    provenance: Mapping[str, Any],
    density: Mapping[str, float | None],
    signals: Mapping[str, Mapping[str, SignalValue]],
    reasons: Mapping[str, str],
    hbm_threshold: float,
    cpu_threshold: float,
    parameter_digest: str | None = None,
    extra_signals: Mapping[str, Mapping[str, SignalValue]] | None = None,
) -> Hints:
    """Put a signal's density per block, its provenance and the model's identity together as hints.

    ``parameter_digest``: of the weights, by default of those that the model has in memory.
    ``extra_signals`` (block -> name -> value) is written beside the signal that ranks. Collective
    under FSDP2 (the digest).
    """
    hbm_threshold, cpu_threshold = parse_thresholds(hbm_threshold, cpu_threshold)
    extra_signals = extra_signals or {}
    known = {block.name for block in blocks}
    if unknown := sorted(set(extra_signals) - known):
        raise InputError(
            f"extra signal for {unknown[0]!r}: no such block; the blocks are "
            f"{', '.join(sorted(known)[:3])}, ..."
        )
    return build_hints(
        model=ModelInfo(
            id=model_id,
            revision=revision,
            class_name=class_name(model),
            parameter_digest=parameter_digest or digest_model(model),
        ),
        provenance={**provenance, "created": datetime.now(UTC).isoformat(timespec="seconds")},
        num_bytes={block.name: block.num_bytes for block in blocks},
        num_params={block.name: block.num_params for block in blocks},
        density=density,
        signals={name: {**signals.get(name, {}), **extra_signals.get(name, {})} for name in known},
        reasons=reasons,
        hbm_threshold=hbm_threshold,
        cpu_threshold=cpu_threshold,
    )


def causal_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Return logits (B, T, V) for token ids (B, T), of a Hugging Face model or a plain module."""
    # A cache would keep the activations of every layer alive for nothing.
    options = {"use_cache": False} if hasattr(model, "config") else {}
    output = model(input_ids=ids, **options)
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits


def check_token_ids(ids: Tensor, model: nn.Module) -> None:
    """Raise InputError unless ``ids`` are (B, T) integers inside the model's vocabulary."""
    if ids.dim() != 2 or ids.is_floating_point() or ids.numel() == 0:
        raise InputError(
            f"a batch must be integer token ids of shape (sequences, length), not {ids.dtype} "
            f"{tuple(ids.shape)}"
        )
    config = getattr(model, "config", None)
    vocabulary = getattr(config, "vocab_size", None)
    if isinstance(vocabulary, int) and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise InputError(
            f"token ids {int(ids.min())}..{int(ids.max())} are outside the model's vocabulary of "
            f"{vocabulary}: use the "
            "tokenizer that the model was trained with"
        )


def class_name(model: nn.Module) -> str:
    """Return the model's own class, without wrappers and without FSDP2's derived class."""
    cls: type = type(unwrap_model(model))
    sharded = _fsdp_classes("FSDPModule")
    if issubclass(cls, sharded):
        cls = next(base for base in cls.__bases__ if not issubclass(base, sharded))
    return cls.__name__


def dtype_names(model: nn.Module) -> str:
    """Return the dtypes of the weights, such as ``float32`` or ``bfloat16+float32``."""
    dtypes = {parameter.dtype for parameter in unique_parameters(model).values()}
    return "+".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def _fsdp_classes(name: str) -> tuple[type, ...]:
    """Return a class of torch.distributed.fsdp; none where nobody has imported that, which takes 2
    seconds, so that no model can be of it.
    """
    module = sys.modules.get("torch.distributed.fsdp")
    return () if module is None else (getattr(module, name),)
