"""Tiers as vLLM's offload arguments, as a file for ``vllm serve --config``.

vLLM offloads parameters of decoder layers, from the first layer on, until ``cpu-offload-gb`` (GiB
per GPU) is reached; ``cpu-offload-params`` limits it to names within a layer, such as ``mlp``. So
how much leaves the GPU is taken from the hints, and of which kind; which layers can't be said.
Names and meaning: vllm/config/offload.py and vllm/model_executor/offloader/uva.py of vLLM 0.33.
"""

from collections import Counter

from ..errors import InputError
from ..units import GIB, format_bytes
from ..vocabulary import Tier
from .outline import Export, Outline, list_some

FILE = "vllm.yaml"


def export_vllm(outline: Outline) -> Export:
    """Return the arguments as YAML; raises InputError for a model without numbered layers."""
    if not outline.num_layers:
        raise InputError(f"vLLM offloads decoder layers, and {outline.class_name} has none")
    away: Counter[str] = Counter()
    total: Counter[str] = Counter()
    lost = []
    outside = []
    for block in outline.blocks:
        offloaded = block.hint.tier is not Tier.HBM
        if block.layer is None:
            outside += [block.name] * offloaded
            continue
        for weight in block.weights:
            kind = _kind(weight.name)
            total[kind] += weight.num_bytes
            away[kind] += weight.num_bytes * offloaded
    if outside:
        lost.append(f"{list_some(outside)}: vLLM offloads nothing outside the decoder layers")
    kinds = _choose_kinds(away, total)
    lines = [f"cpu-offload-gb: {away.total() / GIB:.6f}"]
    if 0 < len(kinds) < len(total):
        lines.append("cpu-offload-params:")
        lines += [f"  - {kind}" for kind in kinds]
    tiers = {block.hint.tier for block in outline.blocks}
    if away:
        lost.append(
            f"which layers: vLLM fills {format_bytes(away.total())} from the first layer on, "
            "whatever the hints say of later ones"
        )
    far = sorted(map(str, tiers - {Tier.HBM, Tier.CPU}))
    if far:
        lost.append(f"tiers {', '.join(far)}: vLLM offloads to host memory alone, it is used")
    lost.append(
        "precision per block: quantize the checkpoint first (--to torchao), then vLLM reads it"
    )
    return Export(
        files={FILE: "\n".join(lines) + "\n"},
        summary={"offloaded_bytes": away.total(), "parameters": kinds},
        commands=(f"vllm serve MODEL --config {FILE}",),
        lost=tuple(lost),
    )


def _kind(parameter: str) -> str:
    """Return the child of the layer that a parameter lies in: model.layers.3.mlp.up -> mlp."""
    steps = parameter.split(".")
    number = next(index for index, step in enumerate(steps) if step.isdigit())
    return steps[number + 1]


def _choose_kinds(away: Counter[str], total: Counter[str]) -> list[str]:
    """Return the kinds with the largest offloaded share that together hold what is offloaded."""
    order = sorted(away, key=lambda kind: away[kind] / total[kind], reverse=True)
    chosen: list[str] = []
    for kind in order:
        if sum(total[name] for name in chosen) >= away.total():
            break
        chosen.append(kind)
    return sorted(chosen)
