"""Modes of PyTorch that a caller may be in: attach, forwards and detach do the same in each."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_model
from tiny_models import tiny_llama
from torch import nn

from lib.tiering import attach, empty_weights

IDS = torch.arange(6)[None]
EVERYTHING = {"HBM": None, "SSD": None}


@contextmanager
def setting(set_it: Callable[[Any], Any], value: Any, before: Any) -> Iterator[None]:
    set_it(value)
    try:
        yield
    finally:
        set_it(before)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "torch.device('meta')": lambda: torch.device("meta"),
    "default device meta": lambda: setting(torch.set_default_device, "meta", None),
    "default device cuda": lambda: setting(torch.set_default_device, "cuda", None),
    "default dtype float16": lambda: setting(torch.set_default_dtype, torch.float16, torch.float32),
    "default dtype float64": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "inference mode": torch.inference_mode,
    "deterministic algorithms": lambda: setting(torch.use_deterministic_algorithms, True, False),
    "gradients": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}
PLANS: dict[str, dict[str, Any]] = {
    "streamed": {"budget": {"HBM": "28KiB", "SSD": None}},
    "resident": {"budget": EVERYTHING},
    "int4": {"budget": EVERYTHING, "precision": "int4"},
    "int8, streamed": {"budget": {"HBM": "54KiB", "SSD": None}, "precision": "int8"},
    "emulated": {"budget": {"HBM": "28KiB", "SSD": None}, "mode": "emulated"},
    "a checkpoint's": {"budget": {"HBM": "28KiB", "SSD": None}, "weights": "model.safetensors"},
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_attach_does_not_depend_on_the_caller_s_modes(mode: str, plan: str, tmp_path: Path) -> None:
    options = dict(PLANS[plan])

    def build() -> nn.Module:
        if "weights" not in options:
            return tiny_llama().eval()
        with empty_weights():
            return tiny_llama().eval()

    if "weights" in options:
        save_model(tiny_llama(), str(tmp_path / "model.safetensors"))
        options["weights"] = tmp_path / "model.safetensors"
    with attach(build(), **options) as runtime:
        expected = runtime._model(IDS).logits
    model = build()
    with MODES[mode]():
        runtime = attach(model, **options)
    assert torch.equal(model(IDS).logits, expected)
    if mode != "autocast":
        with MODES[mode](), torch.no_grad():
            assert torch.equal(model(IDS, position_ids=IDS).logits, expected)
    with MODES[mode]():
        runtime.budget = EVERYTHING
        state = model.state_dict() if "int" not in plan else {}
    assert torch.equal(model(IDS).logits, expected)
    with MODES[mode]():
        runtime.detach()
    given = tiny_llama().state_dict()
    assert all(torch.equal(value, given[name]) for name, value in state.items())
    if "weights" not in options:
        after = model.state_dict()
        assert all(torch.equal(after[name], value) for name, value in given.items())
        assert not any(value.is_inference() for value in after.values())
