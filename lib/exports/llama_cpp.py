"""Precisions and tiers as llama.cpp's ``--tensor-type-file`` and ``--override-tensor``.

CRITICAL, HIGH, MEDIUM and LOW blocks become Q6_K, Q5_K, Q4_K and Q3_K; a stricter floor becomes
Q8_0, BF16 or F32. K-quants pack 256 weights of a row: where rows aren't multiples of that,
llama-quantize falls back to the types in ``_FALLBACK`` (``tensor_type_fallback`` in
src/llama-quant.cpp), which are larger; here they are chosen, and counted, openly. Bits per weight
are from gguf's own table.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..errors import InputError
from ..hints import BlockHint
from ..vocabulary import Precision, Tier
from .gguf_names import GgufNames, import_gguf, is_quantizable
from .outline import Export, Outline, OutlineBlock, Weight, list_some
from .widths import Candidate, Widths, choose_widths

TYPES_FILE = "tensor_types.txt"
PLACES_FILE = "override_tensor.txt"
_STEPS = (Precision.INT6, Precision.INT5, Precision.INT4, Precision.INT3)
_TYPES = {
    Precision.FP32: "F32",
    Precision.BF16: "BF16",
    Precision.FP16: "F16",
    Precision.INT8: "Q8_0",
    Precision.INT6: "Q6_K",
    Precision.INT5: "Q5_K",
    Precision.INT4: "Q4_K",
    Precision.INT3: "Q3_K",
}
_FALLBACK = {"Q6_K": "Q8_0", "Q5_K": "Q5_1", "Q4_K": "Q5_0", "Q3_K": "Q4_0"}
_ORDER = list(Precision)


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor of the GGUF file, or the share of it that belongs to one block (an expert)."""

    name: str
    block: OutlineBlock
    weight: Weight
    num_params: int


def export_llama_cpp(outline: Outline, *, bits: float | None) -> Export:
    """Return both files. Raises InputError for hints without importance, and for models that gguf
    doesn't know.
    """
    names = GgufNames(outline.model_type, outline.num_layers)
    tensors, unknown = _list_tensors(outline, names)
    matrices = [tensor for tensor in tensors if is_quantizable(tensor.name, tensor.weight)]
    if not matrices:
        raise InputError(f"no weight of {outline.class_name} has a GGUF name that can be quantized")
    widths, lost = _choose(matrices, bits)
    types, lost_types = _tensor_types(matrices, widths)
    places, lost_places = _places(outline, tensors)
    lost += lost_types
    if unknown:
        lost.insert(0, f"no GGUF tensor for {list_some(unknown)}: llama.cpp drops or derives them")
    if widths.basis == "kl":
        lost.append(
            "KL curves: they were measured with group-wise integers of the same width; the error "
            "of a K-quant is another, mostly smaller"
        )
    files = {TYPES_FILE: "".join(f"^{re.escape(n)}$={t.lower()}\n" for n, t in types.items())}
    quantize = f"llama-quantize --tensor-type-file {TYPES_FILE} model-f16.gguf model.gguf Q4_K"
    run = "llama-cli -m model.gguf -ngl 99"
    if places:
        files[PLACES_FILE] = ",".join(places) + "\n"
        run += f' -ot "$(cat {PLACES_FILE})"'
    return Export(
        files=files,
        summary={
            "tensors": len(types),
            "types": dict(Counter(types.values())),
            "chosen_by": widths.basis,
            "bits_per_weight": _mean_bits(matrices, types),
            "predicted_kl": widths.predicted_kl,
            "blocks": {name: str(precision) for name, precision in widths.precisions.items()},
        },
        commands=(quantize, run),
        lost=(*widths.lost, *lost, *lost_places),
    )


def type_bits(kind: str) -> float:
    """Return bits per weight of a GGUF type, scales included."""
    gguf = import_gguf()
    per_block, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return float(num_bytes * 8 / per_block)


def real_type(precision: Precision, weight: Weight) -> str:
    """Return the type that llama-quantize gives a matrix of this shape."""
    kind = _TYPES[precision]
    if kind in _FALLBACK and weight.row_length % 256:
        kind = _FALLBACK[kind]
    return "F16" if kind.startswith("Q") and weight.row_length % 32 else kind


def _list_tensors(outline: Outline, names: GgufNames) -> tuple[list[_Tensor], list[str]]:
    tensors, unknown = [], []
    for block in outline.blocks:
        for weight in block.weights:
            found = names.find(weight)
            if not found:
                unknown.append(weight.name)
            for name in found:
                tensors.append(_Tensor(name, block, weight, weight.num_params // len(found)))
    return tensors, unknown


def _choose(matrices: Sequence[_Tensor], bits: float | None) -> tuple[Widths, list[str]]:
    """Choose a precision for each block. Experts that share tensors are one thing to choose for."""
    members: dict[str, list[_Tensor]] = {}
    for tensor in matrices:
        members.setdefault(tensor.block.name, []).append(tensor)
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, own in members.items():
        groups.setdefault(tuple(tensor.name for tensor in own), []).append(name)
    candidates = []
    for names in groups.values():
        own = [tensor for name in names for tensor in members[name]]
        candidates.append(
            Candidate(
                name=names[0],
                hint=_merge_hints([members[name][0].block for name in names]),
                num_params=sum(tensor.num_params for tensor in own),
                sizes={
                    precision: sum(
                        tensor.num_params * type_bits(real_type(precision, tensor.weight))
                        for tensor in own
                    )
                    for precision in _TYPES
                },
            )
        )
    widths = choose_widths(candidates, _STEPS, bits)
    spread = {name: widths.precisions[names[0]] for names in groups.values() for name in names}
    shared = [name for names in groups.values() if len(names) > 1 for name in names]
    lost = []
    if shared:
        lost.append(
            f"a type per expert: llama.cpp packs a layer's experts, so {len(shared)} of them "
            f"({list_some(shared)}) have the type that their layer's sum of KL asks for, and the "
            "strictest floor"
        )
    return replace(widths, precisions=spread), lost


def _merge_hints(blocks: Sequence[OutlineBlock]) -> BlockHint:
    """Return the hint of blocks that must have one precision: their KL adds up, the strictest floor
    holds, and importance per weight is averaged over the weights.
    """
    hints = [block.hint for block in blocks]
    if len(hints) == 1:
        return hints[0]
    floors = [hint.floor for hint in hints if hint.floor is not None]
    known = [
        (hint.importance, block.num_bytes)
        for hint, block in zip(hints, blocks, strict=True)
        if hint.importance is not None
    ]
    measured = set.intersection(*(set(hint.kl) for hint in hints))
    return replace(
        hints[0],
        importance=sum(value * size for value, size in known) / sum(size for _, size in known)
        if known
        else None,
        kl={precision: sum(hint.kl[precision] for hint in hints) for precision in measured},
        floor=min(floors, key=_ORDER.index) if floors else None,
    )


def _tensor_types(matrices: Sequence[_Tensor], widths: Widths) -> tuple[dict[str, str], list[str]]:
    """Return tensor -> type, and which types had to differ from the one that was asked for."""
    wanted = {t.name: (widths.precisions[t.block.name], t.weight) for t in matrices}
    types = {name: real_type(*asked) for name, asked in wanted.items()}
    odd = {name: _TYPES[wanted[name][0]] for name in types}
    odd = {name: kind for name, kind in odd.items() if kind != types[name]}
    if not odd:
        return types, []
    changes = ", ".join(sorted({f"{kind} -> {types[name]}" for name, kind in odd.items()}))
    return types, [
        f"K-quants for {len(odd)} tensors ({list_some(odd)}): their rows are not multiples of 256, "
        f"so larger types: {changes}"
    ]


def _mean_bits(matrices: Sequence[_Tensor], types: Mapping[str, str]) -> float:
    num_params = sum(tensor.num_params for tensor in matrices)
    return sum(t.num_params * type_bits(types[t.name]) for t in matrices) / num_params


def _places(outline: Outline, tensors: Sequence[_Tensor]) -> tuple[list[str], list[str]]:
    """Return ``regex=buffer`` of every tensor that isn't in fast memory, layers of a kind together;
    and what can't be said that way.
    """
    tiers: dict[str, Counter[Tier]] = {}
    for tensor in tensors:
        tiers.setdefault(tensor.name, Counter())[tensor.block.hint.tier] += tensor.num_params
    kinds: dict[tuple[str, str], list[int]] = {}
    places = []
    for name, members in tiers.items():
        if members.most_common(1)[0][0] is Tier.HBM:
            continue
        match = re.fullmatch(r"blk\.(\d+)\.(.+)\.(\w+)", name)
        if match:
            kinds.setdefault((match[2], match[3]), []).append(int(match[1]))
        else:
            places.append(f"^{re.escape(name)}$=CPU")
    for (kind, suffix), layers in kinds.items():
        numbers = "|".join(map(str, sorted(layers)))
        places.append(rf"^blk\.({numbers})\.{re.escape(kind)}\.{suffix}$=CPU")
    lost = []
    far = sorted({str(b.hint.tier) for b in outline.blocks} - {Tier.HBM, Tier.CPU})
    if far:
        lost.append(
            f"tiers {', '.join(far)}: llama.cpp has device and CPU buffers, so CPU; mmap (its "
            "default) lets the system drop those pages and read them from the file again"
        )
    if any(len(members) > 1 for members in tiers.values()):
        lost.append("experts of one tensor in several tiers: the tier of most of them is taken")
    if Tier.HBM in tiers.get("token_embd.weight", {}):
        lost.append("token_embd.weight in HBM: llama.cpp keeps the input embedding in RAM")
    return places, lost
