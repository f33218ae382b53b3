"""Precisions as a torchao ``FqnToConfig``: module name -> how its weight is quantized.

The file is what torchao's own ``config_to_dict`` writes, so ``config_from_dict`` reads it, and
Transformers' ``TorchAoConfig`` takes the result. On CUDA only int8 and int4 are used, whose bytes
really shrink; on the CPU every width, but torchao then keeps each weight in a whole byte: right for
measuring quality, no saving below int8.
"""

import json
from collections.abc import Sequence
from typing import Any

from ..errors import InputError
from ..vocabulary import Precision
from .outline import Export, MatrixKind, Outline, OutlineBlock, Weight, list_some
from .widths import Candidate, choose_widths

FILE = "torchao.json"
_SCALE_BITS = 32
"""A scale and a zero point (or minimum) in 16 bits each, per group."""
_GROUPS = (64, 32)
_CUDA_STEPS = (Precision.INT8, Precision.INT4)
_CPU_STEPS = (Precision.INT6, Precision.INT5, Precision.INT4, Precision.INT3)
_LEFT_ALONE = "left as they are"
_LEFT = {
    MatrixKind.CONV1D: "GPT-2's Conv1D, which torchao skips (it takes nn.Linear)",
    MatrixKind.EXPERTS: "experts packed into one parameter",
    MatrixKind.EXPERTS_TRANSPOSED: "experts packed into one parameter",
    MatrixKind.EMBEDDING: "embeddings",
}
_FLOATS = (Precision.FP32, Precision.BF16, Precision.FP16)
_CUDA_SIZES = (*_FLOATS, Precision.INT8, Precision.INT4)


def export_torchao(outline: Outline, *, device: str, bits: float | None) -> Export:
    """Return the configuration as JSON; raises InputError where torchao quantizes no module."""
    steps = _CUDA_STEPS if device == "cuda" else _CPU_STEPS
    known: Sequence[Precision] = _CUDA_SIZES if device == "cuda" else tuple(Precision)
    linear = {
        block.name: [weight for weight in block.weights if _is_plain(weight)]
        for block in outline.blocks
    }
    blocks = [block for block in outline.blocks if linear[block.name]]
    lost = _lost(outline, device)
    if not blocks:
        why = "; ".join(line for line in lost if line.startswith(_LEFT_ALONE))
        raise InputError(f"torchao has nothing to quantize in {outline.class_name}: {why}")
    widths = choose_widths(
        [_candidate(block, linear[block.name], known, device) for block in blocks], steps, bits
    )
    configs: dict[str, dict[str, Any] | None] = {}
    for block in blocks:
        precision = widths.precisions[block.name]
        for weight in linear[block.name]:
            if precision in _FLOATS:
                configs[weight.module] = None
            else:
                real = _feasible(precision, weight, device)
                if real is not precision:
                    lost.append(
                        f"{weight.module}: rows of {weight.row_length} are not whole groups of 32, "
                        f"which {precision} needs, so {real}"
                    )
                configs[weight.module] = _config(real, weight, device)
    # The second name is the one older releases know the same map by; torchao writes both.
    data = {"fqn_to_config": configs, "module_fqn_to_config": configs}
    document = {"_type": "FqnToConfig", "_version": 1, "_data": data}
    return Export(
        files={FILE: json.dumps(document, indent=2) + "\n"},
        summary={
            "modules": len(configs),
            "chosen_by": widths.basis,
            "bits_per_weight": widths.bits,
            "predicted_kl": widths.predicted_kl,
            "blocks": {name: str(precision) for name, precision in widths.precisions.items()},
        },
        commands=(
            f'config = config_from_dict(json.load(open("{FILE}")))  # torchao.core.config',
            "quantize_(model, config, filter_fn=None)  # torchao.quantization",
        ),
        lost=(*widths.lost, *lost),
    )


def _is_plain(weight: Weight) -> bool:
    return weight.layout is MatrixKind.LINEAR and not weight.tied


def _candidate(
    block: OutlineBlock, weights: Sequence[Weight], known: Sequence[Precision], device: str
) -> Candidate:
    return Candidate(
        name=block.name,
        hint=block.hint,
        num_params=sum(weight.num_params for weight in weights),
        sizes={
            precision: sum(_bits(precision, weight, device) for weight in weights)
            for precision in known
        },
    )


def _bits(precision: Precision, weight: Weight, device: str) -> float:
    """Return the bits that carry information, scales included; the CPU's whole bytes aren't."""
    if precision in _FLOATS:
        return weight.num_bytes * 8
    precision = _feasible(precision, weight, device)
    group = _group(weight) if precision is not Precision.INT8 else None
    return weight.num_params * (
        int(precision.removeprefix("int")) + _SCALE_BITS / (group or weight.row_length)
    )


def _feasible(precision: Precision, weight: Weight, device: str) -> Precision:
    """Return int8 where torchao would silently leave a matrix alone: int4 wants whole groups."""
    return Precision.INT8 if device == "cuda" and _group(weight) is None else precision


def _group(weight: Weight) -> int | None:
    """Return the weights that share a scale, or None for a whole row."""
    return next((size for size in _GROUPS if weight.row_length % size == 0), None)


def _config(precision: Precision, weight: Weight, device: str) -> dict[str, Any]:
    group = _group(weight)
    if precision is Precision.INT8:
        return _entry("Int8WeightOnlyConfig", 2, granularity=_entry("PerRow", 1, dim=-1))
    if device == "cuda":
        return _entry(
            "Int4WeightOnlyConfig",
            2,
            group_size=group,
            int4_packing_format={"_type": "Int4PackingFormat", "_data": "TILE_PACKED_TO_4D"},
        )
    return _entry(
        "IntxWeightOnlyConfig",
        2,
        weight_dtype={"_type": "torch.dtype", "_data": str(precision)},
        granularity=_entry("PerGroup", 1, group_size=group)
        if group
        else _entry("PerAxis", 1, axis=0),
        mapping_type={"_type": "MappingType", "_data": "ASYMMETRIC"},
    )


def _entry(kind: str, version: int, **data: Any) -> dict[str, Any]:
    return {"_type": kind, "_version": version, "_data": data}


def _lost(outline: Outline, device: str) -> list[str]:
    names: dict[str, list[str]] = {}
    for block in outline.blocks:
        for weight in block.weights:
            reason = (
                "tied, and quantizing would untie them" if weight.tied else _LEFT.get(weight.layout)
            )
            if reason:
                names.setdefault(reason, []).append(weight.name)
    lost = [f"{_LEFT_ALONE}, {reason}: {list_some(names[reason])}" for reason in names]
    if device == "cpu":
        lost.append(
            "memory: torchao has no packed int2 to int7 on a CPU, a weight takes a byte; use "
            "--device cuda for a configuration that saves"
        )
    else:
        lost.append("int5, int6, int3 and int2: torchao's CUDA kernels have int8 and int4")
    lost.append("tiers: a torchao configuration places nothing")
    return lost
