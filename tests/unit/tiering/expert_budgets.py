"""Mixtures within a budget: budgets for a share of their experts, outputs to compare, hints."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lib.blocks import BlockKind, parameter_digest, partition_model
from lib.hints import Hints, ModelInfo
from lib.hints.building import build_hints
from lib.tiering import Runtime
from lib.tiering.residency.experts import ExpertSlots

IDS = (torch.arange(2 * 20).view(2, 20) * 7) % 40


def outputs(model: Any) -> list[Tensor]:
    """A prompt in a batch, one token, and a text with its steps."""
    with torch.no_grad():
        text = model.generate(
            IDS[:1, :4], max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None
        )
        return [model(IDS).logits, model(IDS[:1, :1]).logits, text]


def expert_bytes(model: nn.Module) -> int:
    blocks = partition_model(model)
    return sum(block.num_bytes for block in blocks if block.kind is BlockKind.EXPERT)


def budget_for(model: nn.Module, share: float) -> dict[str, int | None]:
    """Fast memory for all but the experts, and for a share of these and what they pass through."""
    total = sum(parameter.nbytes for parameter in model.parameters())
    return {"HBM": int(total - expert_bytes(model) * (1 - share)) + 16_384, "SSD": None}


def slots_of(runtime: Runtime) -> ExpertSlots:
    return runtime._keeper.residency.experts


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def make_hints(model: nn.Module, **changes: dict[str, Any]) -> Hints:
    """Hints without curves, all blocks alike but for what is changed of some: field -> block ->
    value.
    """
    blocks = partition_model(model)
    info = ModelInfo(
        id="toy",
        revision="",
        class_name=type(model).__name__,
        parameter_digest=parameter_digest(model),
    )
    hints = build_hints(
        model=info,
        provenance={"signal": "adam_exp_avg_sq", "created": "2026-01-01T00:00:00+00:00"},
        num_bytes={block.name: block.num_bytes for block in blocks},
        num_params={block.name: block.num_params for block in blocks},
        density={block.name: 1.0 for block in blocks},
        signals={block.name: {} for block in blocks},
        reasons={},
        hbm_threshold=0.4,
        cpu_threshold=0.7,
    )
    made = dict(hints.blocks)
    for field, values in changes.items():
        for name, value in values.items():
            made[name] = replace(made[name], **{field: value})
    return replace(hints, blocks=made)
