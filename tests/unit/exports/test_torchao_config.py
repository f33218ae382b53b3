"""Precisions as a torchao configuration, applied by torchao's own quantize_."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from export_models import outline_of, tiny_llama
from tiny_models import tiny_gpt2, tiny_mixtral
from transformers import AutoModelForCausalLM

from lib.errors import InputError
from lib.exports import export_torchao
from lib.vocabulary import Precision

torchao = pytest.importorskip("torchao", minversion="0.18")

TOKENS = torch.arange(24).reshape(2, 12)


def read_config(text: str | bytes) -> Any:
    from torchao.core.config import config_from_dict

    return config_from_dict(json.loads(text))


def quantized(model: torch.nn.Module, **options: Any) -> torch.nn.Module:
    """Export, read the file and apply it: the two lines that the documentation gives."""
    from torchao.quantization import quantize_

    bits = options.pop("bits", None)
    export = export_torchao(outline_of(model, **options), device="cpu", bits=bits)
    quantize_(model, read_config(export.files["torchao.json"]), filter_fn=None)
    return model


def test_each_linear_layer_gets_its_blocks_precision() -> None:
    model = tiny_llama()
    floors = {
        "model.layers.0.self_attn": Precision.BF16,
        "model.layers.0.mlp": Precision.INT8,
        "model.layers.1.self_attn": Precision.INT6,
        "model.layers.1.mlp": Precision.INT3,
        "model.layers.2.self_attn": Precision.INT4,
        "model.layers.2.mlp": Precision.INT5,
        "lm_head": Precision.INT6,
    }
    quantized(model, floors=floors)
    kinds = {
        name: str(getattr(module.weight, "target_dtype", type(module.weight.data).__name__))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    expected = {"bf16": "Tensor", "int8": "Int8Tensor"} | {
        f"int{n}": f"torch.int{n}" for n in range(3, 7)
    }
    for name, kind in kinds.items():
        block = max((b for b in floors if name.startswith(b)), key=len)
        assert kind == expected[floors[block]], name
    assert type(model.model.embed_tokens.weight.data) is torch.Tensor
    assert torch.isfinite(model(TOKENS).logits).all()


def test_more_bits_mean_less_error() -> None:
    with torch.no_grad():
        exact = tiny_llama()(TOKENS).logits
        errors = [
            (quantized(tiny_llama(), bits=bits)(TOKENS).logits - exact).square().mean().item()
            for bits in (3.5, 4.5, 5.5, 6.5)
        ]
    assert errors == sorted(errors, reverse=True) and errors[-1] > 0


def test_transformers_loads_a_model_with_the_file(tmp_path: Path) -> None:
    from transformers import TorchAoConfig

    model = tiny_llama()
    model.save_pretrained(tmp_path)
    export = export_torchao(outline_of(model), device="cpu", bits=5.0)
    settings = TorchAoConfig(
        read_config(export.files["torchao.json"]), include_input_output_embeddings=True
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings)
    by_hand = quantized(tiny_llama(), bits=5.0)
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, by_hand(TOKENS).logits)


def test_the_configuration_for_cuda_saves_memory_only_where_kernels_are() -> None:
    export = export_torchao(outline_of(tiny_llama()), device="cuda", bits=None)
    config = read_config(export.files["torchao.json"])
    kinds = {type(value).__name__ for value in config.fqn_to_config.values()}
    assert kinds <= {"NoneType", "Int8WeightOnlyConfig", "Int4WeightOnlyConfig"}
    assert "Int4WeightOnlyConfig" in kinds and "int5, int6" in " ".join(export.lost)


@pytest.mark.gpu
def test_the_configuration_for_cuda_runs_there() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from torchao.quantization import quantize_

    model: Any = tiny_llama(256).to("cuda", torch.bfloat16)
    export = export_torchao(outline_of(tiny_llama(256)), device="cuda", bits=6.0)
    quantize_(model, read_config(export.files["torchao.json"]), filter_fn=None)
    assert torch.isfinite(model(TOKENS.cuda()).logits).all()


def test_what_torchao_leaves_alone_is_said() -> None:
    with pytest.raises(InputError, match=r"nothing to quantize in GPT2LMHeadModel: .*Conv1D"):
        export_torchao(outline_of(tiny_gpt2()), device="cpu", bits=None)
    mixtral = export_torchao(outline_of(tiny_mixtral()), device="cpu", bits=None)
    assert any("experts packed into one parameter: model.layers.0" in line for line in mixtral.lost)
    tied = export_torchao(outline_of(tiny_llama(tied=True)), device="cpu", bits=None)
    assert any("untie them: model.embed_tokens.weight" in line for line in tied.lost)
    assert "lm_head" not in tied.files["torchao.json"]  # type: ignore[operator]


def test_rows_without_whole_groups_are_int8_on_cuda_and_said() -> None:
    model = tiny_llama(48)
    floors = {block.name: Precision.INT4 for block in outline_of(model).blocks}
    export = export_torchao(outline_of(model, floors=floors), device="cuda", bits=None)
    config = read_config(export.files["torchao.json"])
    for name, value in config.fqn_to_config.items():
        whole = name.endswith("down_proj")  # rows of 96, the others of 48
        assert type(value).__name__ == f"Int{4 if whole else 8}WeightOnlyConfig", name
    assert any("are not whole groups of 32" in line for line in export.lost)


def test_flat_hints_are_refused() -> None:
    with pytest.raises(InputError, match="no importance and no KL curves"):
        export_torchao(outline_of(tiny_llama(), flat=True), device="cpu", bits=None)
