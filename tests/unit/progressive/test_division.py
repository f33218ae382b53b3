"""How a budget is divided between a draft and the full weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_llama
from transformers import LlamaConfig, LlamaForCausalLM

from lib.blocks import partition_model
from lib.codecs.kernels import kernel_name
from lib.hints import BlockHint, Hints
from lib.machine import UNMEASURED
from lib.progressive import division
from lib.progressive.attach import attach
from lib.progressive.division import LONGEST, WIDTHS, divide
from lib.progressive.exact import ExactRuntime
from lib.vocabulary import Tier


def test_a_pass_is_planned_with_the_rate_of_products_with_as_many_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def rate(rows: int, dtype: torch.dtype) -> float:
        assert rows == LONGEST + 1 and dtype == torch.float32
        return 1e6

    monkeypatch.setattr(division, "measure_rows", rate)
    budget = {"HBM": "10MiB", "SSD": None}
    here = divide(tiny_llama(), None, budget=budget, precision="int8")
    assert here.full.machine.compute == {"fp32": 1e6}
    assert "fp32" not in here.draft.machine.compute
    weights = sum(block.num_params for block in here.full.blocks)
    assert here.full.plan.predicted.compute_seconds == pytest.approx(weights / 1e6, rel=0.5)
    there = replace(UNMEASURED, compute={"fp32": 1e9, "int8": 2e9})
    declared = divide(tiny_llama(), None, budget=budget, precision="int8", machine=there)
    assert declared.full.machine == declared.draft.machine == there
    probed = replace(there, measured=True)
    measured = divide(tiny_llama(), None, budget=budget, precision="int8", machine=probed)
    assert measured.full.machine.compute == {"fp32": 1e6, "int8": 2e9}
    emulated = divide(tiny_llama(), None, budget=budget, precision="int8", mode="emulated")
    assert emulated.full.machine == emulated.draft.machine


def model_and_hints() -> tuple[Any, Hints]:
    """A model of 1.6 MiB, and hints by which the first layer's weights alone cost much."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config).eval()
    nats = {
        block.name: 0.2 if block.name.startswith("model.layers.0.") else 0.001
        for block in partition_model(model)
    }
    blocks = {
        name: BlockHint(
            tier=Tier.HBM,
            kl={width: most * 4.0 ** -(int(str(width)[3:]) - 2) for width in WIDTHS},
        )
        for name, most in nats.items()
    }
    quality = {
        "calibrated": True,
        "conformal_factor": 1.0,
        "conformal_probes": 60,
        "kernels": {"name": kernel_name("cpu", torch.float32), "nats": 0.0},
    }
    return model, Hints(blocks=blocks, quality=quality)


def test_a_draft_is_mixed_where_more_of_it_is_accepted_at_the_bytes_of_a_width(
    tmp_path: Path,
) -> None:
    model, hints = model_and_hints()
    budget = {"HBM": 10 * 2**20, "SSD": None}
    wide = divide(model, hints, budget=budget)
    assert wide.name == "int8"
    int4 = divide(model, hints, budget=budget, precision="int4")
    budget["HBM"] = int4.draft.plan.fast_bytes + 600 * 2**10
    chosen = divide(model, hints, budget=budget)
    assert chosen.name is not None and chosen.name.startswith("mixed, of int")
    assert isinstance(chosen.precision, dict)
    first = [width for name, width in chosen.precision.items() if ".layers.0." in name]
    others = [width for name, width in chosen.precision.items() if ".layers.0." not in name]
    assert min(first) > min(others)
    width = chosen.name.removeprefix("mixed, of ").removesuffix("'s bytes")
    uniform = divide(model, hints, budget=budget, precision=width)
    assert chosen.draft.plan.fast_bytes < 1.01 * uniform.draft.plan.fast_bytes  # but for alignment
    assert (chosen.acceptance or 0) > (uniform.acceptance or 0)
    assert chosen.to_json()["precision"] == chosen.name

    ids = torch.arange(1, 9).view(1, -1)
    how: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    want = model.generate(ids, **how)
    with attach(model, hints, budget=budget, exact=True, spill_dir=tmp_path) as runtime:
        assert isinstance(runtime, ExactRuntime)
        assert runtime.draft.name == chosen.name
        assert torch.equal(model.generate(ids, **how), want)
        assert runtime.plan.fast_bytes + runtime.draft.fast_bytes <= budget["HBM"]
