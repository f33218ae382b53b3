"""Packed experts: where a checkpoint has the slices of tensors that a model holds whole.

transformers' mixture models keep all experts of a layer in one tensor, gate and up projections
beside each other, and save one tensor per expert and projection, partly under other names
(transformers.conversion_mapping). Their own tables say which: layers that only stack experts and
put projections below each other can be read expert by expert, and so can renamed tensors. Anything
else stays unknown, and is then missing from the checkpoint.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

Layout = tuple[tuple[str, ...], ...]
"""Per expert the names of the tensors that lie below each other in its slice."""


def packed_layouts(
    model: nn.Module, names: Iterable[str]
) -> tuple[dict[str, str], dict[str, Layout]]:
    """Return the model's names of renamed tensors with the checkpoint's, and of stacked ones with
    what they consist of.
    """
    if not hasattr(model, "base_model_prefix"):
        return {}, {}
    from transformers import conversion_mapping
    from transformers import core_model_loading as loading

    transforms = conversion_mapping.get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [entry for entry in transforms if isinstance(entry, loading.WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, loading.WeightConverter)]
    prefix: Any = model.base_model_prefix
    own = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    wanted = dict.fromkeys((name for name, _ in own), True)
    renamed: dict[str, str] = {}
    slices: dict[str, dict[str, list[str]]] = {}
    for name in sorted(names, key=loading.dot_natural_key):
        target, pattern = loading.rename_source_key(name, renamings, converters, prefix, wanted)
        if target not in wanted:
            continue
        if pattern is not None:
            slices.setdefault(target, {}).setdefault(pattern, []).append(name)
        elif target != name:
            renamed[target] = name
    stacked = {}
    for target, found in slices.items():
        order = _stacking_order(converters, set(found), loading)
        if order is not None and len({len(found[pattern]) for pattern in order}) == 1:
            stacked[target] = tuple(zip(*(found[pattern] for pattern in order), strict=True))
    return renamed, stacked


def _stacking_order(
    converters: Iterable[Any], patterns: set[str], loading: Any
) -> list[str] | None:
    """Return the order of the projections in an expert's slice; None where more is done to them."""
    for converter in converters:
        if set(converter.source_patterns) == patterns:
            merge, *rest = converter.operations
            stacks = isinstance(merge, loading.MergeModulelist) and merge.dim == 0
            joins = all(isinstance(step, loading.Concatenate) and step.dim == 1 for step in rest)
            if stacks and joins and len(rest) == (len(patterns) > 1):
                return list(converter.source_patterns)
    return None
