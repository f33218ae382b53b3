"""What kernels cost beyond the weights' error, on CPUs with and without bf16 units."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lib.blocks import parameter_digest
from lib.codecs import expansion, kernels, ops
from lib.evaluation.kernel_error import measure_kernels


def small_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=1,
        n_embd=64,
        n_head=2,
        vocab_size=80,
        n_positions=64,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()


def test_kernels_of_ours_round_next_to_nothing() -> None:
    if ops.prepare("cpu") == "reference":
        pytest.skip("our kernels were not built")
    tokens = torch.randint(0, 80, (3, 48), generator=torch.Generator().manual_seed(0))
    found = measure_kernels(small_gpt2(), tokens, device=torch.device("cpu"))
    assert found["name"] == "cpu native, fp32"
    assert found["nats"] < 1e-8


@pytest.mark.parametrize("has_bf16", [True, False])
def test_what_rounds_activations_costs_something(
    has_bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ops.prepare("cpu") == "native":
        pytest.skip("torch's kernels serve where ours can't be had")
    for module in (expansion, kernels):
        monkeypatch.setattr(module, "cpu_computes_bf16", lambda: has_bf16)
    model = small_gpt2()
    before = parameter_digest(model)
    tokens = torch.randint(0, 80, (3, 48), generator=torch.Generator().manual_seed(0))
    found = measure_kernels(model, tokens, device=torch.device("cpu"))
    by_precision = found["by_precision"]
    assert parameter_digest(model) == before
    assert found["name"] == "cpu reference, fp32"
    assert found["nats"] == max(by_precision.values())
    fused = [by_precision["int8"], by_precision["int4"]]
    expanded = [value for name, value in by_precision.items() if name not in ("int8", "int4")]
    assert all(1e-7 < value < 1e-2 for value in fused)
    assert max(expanded) < 1e-9  # fp32 activations are multiplied in fp32 on every CPU
