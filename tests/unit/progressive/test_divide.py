"""How a budget is divided between a draft and the full weights."""

from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_llama

from lib.machine import UNMEASURED
from lib.progressive import draft
from lib.progressive.draft import LONGEST, divide


def test_a_pass_is_planned_with_the_rate_of_products_with_as_many_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def rate(rows: int, dtype: torch.dtype) -> float:
        assert rows == LONGEST + 1 and dtype == torch.float32
        return 1e6

    monkeypatch.setattr(draft, "measure_rows", rate)
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
