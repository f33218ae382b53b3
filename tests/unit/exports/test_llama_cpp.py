"""llama.cpp's tensor types and placements, checked against the gguf package's own names."""

import re
from typing import Any

import pytest
from export_models import outline_of, tiny_llama, tiny_llama_moe
from tiny_models import tiny_gpt2, tiny_mixtral

from lib.errors import InputError
from lib.exports import Export, export_llama_cpp
from lib.exports.gguf_names import GgufNames
from lib.exports.llama_cpp import PLACES_FILE, TYPES_FILE
from lib.vocabulary import Precision, Tier

gguf = pytest.importorskip("gguf")


def read_types(export: Export) -> list[tuple[str, str]]:
    """Split the file as llama-quantize does: by white space, then at the first '='."""
    text = export.files[TYPES_FILE]
    assert isinstance(text, str)
    return [(entry.partition("=")[0], entry.partition("=")[2]) for entry in text.split()]


def type_of(export: Export, tensor: str) -> str | None:
    """Return the type of the first pattern that is found in a name, as llama-quantize does."""
    return next((kind for regex, kind in read_types(export) if re.search(regex, tensor)), None)


def gguf_tensors(arch: str, num_layers: int) -> set[str]:
    """Every tensor name that gguf has for an architecture."""
    key = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[key]}
    return {f"{name.format(bid=layer)}.weight" for name in names for layer in range(num_layers)}


@pytest.mark.parametrize(
    ("build", "arch", "num_layers"),
    [(tiny_gpt2, "gpt2", 2), (tiny_llama, "llama", 3), (tiny_mixtral, "llama", 2)],
)
def test_every_pattern_means_one_tensor_of_the_architecture(
    build: Any, arch: str, num_layers: int
) -> None:
    export = export_llama_cpp(outline_of(build()), bits=None)
    known = gguf_tensors(arch, num_layers)
    types = read_types(export)
    assert types
    for regex, kind in types:
        matched = [name for name in known if re.search(regex, name)]
        assert len(matched) == 1, regex
        assert "norm" not in matched[0] and "position" not in matched[0]
        assert "ffn_gate_inp" not in matched[0]
        gguf.GGMLQuantizationType[kind.upper()]


def test_blocks_have_the_types_of_their_floors() -> None:
    floors = {
        "model.embed_tokens": Precision.INT6,
        "model.layers.0.self_attn": Precision.BF16,
        "model.layers.0.mlp": Precision.INT8,
        "model.layers.1.self_attn": Precision.INT6,
        "model.layers.1.mlp": Precision.INT5,
        "model.layers.2.self_attn": Precision.INT4,
        "model.layers.2.mlp": Precision.INT2,
        "lm_head": Precision.FP32,
    }
    export = export_llama_cpp(outline_of(tiny_llama(256), floors=floors), bits=None)
    assert export.summary["chosen_by"] == "floors"
    expected = {
        "token_embd.weight": "q6_k",
        "blk.0.attn_q.weight": "bf16",
        "blk.0.ffn_down.weight": "q8_0",
        "blk.1.attn_output.weight": "q6_k",
        "blk.1.ffn_up.weight": "q5_k",
        "blk.2.attn_v.weight": "q4_k",
        "blk.2.ffn_gate.weight": "q3_k",
        "output.weight": "f32",
    }
    assert {name: type_of(export, name) for name in expected} == expected


def test_mean_bits_are_what_gguf_would_store() -> None:
    outline = outline_of(tiny_llama(256))
    export = export_llama_cpp(outline, bits=5.0)
    assert export.summary["bits_per_weight"] == pytest.approx(5.0, abs=0.2)
    assert export.summary["bits_per_weight"] <= 5.0  # type: ignore[operator]
    names = GgufNames("llama", 3)
    num_bytes = num_params = 0
    for block in outline.blocks:
        for weight in block.weights:
            (name,) = names.find(weight)
            kind = type_of(export, name)
            if kind:
                quant = gguf.GGMLQuantizationType[kind.upper()]
                num_bytes += (
                    weight.num_params
                    // gguf.GGML_QUANT_SIZES[quant][0]
                    * gguf.GGML_QUANT_SIZES[quant][1]
                )
                num_params += weight.num_params
    assert export.summary["bits_per_weight"] == pytest.approx(num_bytes * 8 / num_params)


def test_rows_that_k_quants_cannot_pack_get_the_fallback_openly() -> None:
    export = export_llama_cpp(outline_of(tiny_llama(64)), bits=None)  # rows of 64 and 128
    assert {kind for _, kind in read_types(export)} <= {"q8_0", "q5_1", "q5_0", "q4_0"}
    assert any("their rows are not multiples of 256" in line for line in export.lost)
    tiny = export_llama_cpp(outline_of(tiny_gpt2()), bits=None)  # rows of 16
    assert type_of(tiny, "blk.0.attn_qkv.weight") == "f16"


def test_experts_of_one_tensor_share_a_type_within_the_budget() -> None:
    outline = outline_of(tiny_llama_moe())
    export = export_llama_cpp(outline, bits=6.0)
    assert 5.5 < export.summary["bits_per_weight"] <= 6.0  # type: ignore[operator]
    blocks = export.summary["blocks"]
    assert isinstance(blocks, dict)
    names = {"int6": "q8_0", "int5": "q5_1", "int4": "q5_0", "int3": "q4_0"}  # rows of 64
    for layer in range(2):
        (shared,) = {blocks[f"model.layers.{layer}.mlp.experts.{index}"] for index in range(4)}
        for kind in ("gate", "up", "down"):
            assert type_of(export, f"blk.{layer}.ffn_{kind}_exps.weight") == names[shared]
    assert any("a type per expert: llama.cpp packs" in line for line in export.lost)
    assert any("experts of one tensor in several tiers" in line for line in export.lost)


def test_the_strictest_floor_of_experts_that_share_a_tensor_holds() -> None:
    floors = {block.name: Precision.INT3 for block in outline_of(tiny_llama_moe()).blocks}
    floors["model.layers.1.mlp.experts.2"] = Precision.INT8
    export = export_llama_cpp(outline_of(tiny_llama_moe(), floors=floors), bits=None)
    assert type_of(export, "blk.1.ffn_up_exps.weight") == "q8_0"
    assert type_of(export, "blk.0.ffn_up_exps.weight") == "q4_0"


def test_tensors_outside_fast_memory_are_overridden_to_the_cpu() -> None:
    outline = outline_of(tiny_llama(256), tiers=(Tier.CPU, Tier.HBM, Tier.SSD))
    export = export_llama_cpp(outline, bits=None)
    text = export.files[PLACES_FILE]
    assert isinstance(text, str)
    entries = [entry.partition("=") for entry in text.strip().split(",")]
    assert {buffer for _, _, buffer in entries} == {"CPU"}
    names = GgufNames("llama", 3)
    for block in outline.blocks:
        for weight in block.weights:
            (name,) = names.find(weight)
            overridden = any(re.search(regex, name) for regex, _, _ in entries)
            assert overridden == (block.hint.tier is not Tier.HBM), name
    assert any(line.startswith("tiers SSD: llama.cpp has device and CPU") for line in export.lost)


def test_a_model_in_fast_memory_needs_no_override() -> None:
    export = export_llama_cpp(outline_of(tiny_llama(256), tiers=(Tier.HBM,)), bits=None)
    assert set(export.files) == {TYPES_FILE}
    assert "-ot" not in export.commands[1]


def test_hints_without_importance_and_unknown_architectures_are_refused() -> None:
    with pytest.raises(InputError, match="no importance and no KL curves"):
        export_llama_cpp(outline_of(tiny_llama(), flat=True), bits=None)
    with pytest.raises(InputError, match="no architecture named 'unheard-of'"):
        GgufNames("unheard-of", 2)
