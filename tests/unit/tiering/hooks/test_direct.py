"""What resides in fast memory has no hooks: only what moves is surrounded, compressed weights
compute at once, and the model compiles. A change of plan changes that, detach leaves no trace.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from smallest_budget import smallest
from tiny_models import tiny_llama
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from lib.codecs.kernels import KERNELS, register_kernel
from lib.codecs.records import RecordLayout, decode
from lib.errors import PlacementError
from lib.tiering import attach
from lib.tiering.residency.stand_ins import OffloadedParameter

ALL = {"HBM": None, "SSD": None}
X = torch.linspace(-1, 1, 2 * 64).reshape(2, 64)
IDS = torch.arange(12).reshape(2, 6)


class Own(nn.Linear):
    """A Linear that multiplies in its own way."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), Conv1D(64, 64), Own(64, 64)).eval()


def surrounded(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "_call_impl" in vars(module)]


def with_forwards(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def test_only_what_moves_is_hooked(tmp_path: Path) -> None:
    model = tiny_llama().eval()
    expected = logits(model)
    parts = {"model", "model.layers", "model.layers.0", "model.layers.1"}
    with attach(model, budget=ALL, spill_dir=tmp_path) as runtime:
        total = runtime.plan.fast_bytes
        assert surrounded(model) == [""]
        assert torch.equal(logits(model), expected)
        stats = runtime.stats()
        assert stats.forwards == 1 and stats.compute_seconds == 0.0
        assert not any(block.calls for block in stats.blocks.values())
        for budget in (total * 3 // 4, None, total * 3 // 4):
            runtime.budget = {"HBM": budget, "SSD": None}
            moving = [name for name, place in runtime.plan.placements.items() if place.unit_bytes]
            assert bool(moving) == (budget is not None)
            assert torch.equal(logits(model), expected)  # the first one in a budget is traced whole
            found = {name for name in surrounded(model) if name in parts}
            assert set(surrounded(model)) - found == {"", *moving}
            assert bool(found) == bool(moving)
            assert torch.equal(logits(model), expected)
    assert not surrounded(model)


def test_plans_know_the_order_of_what_resides(tmp_path: Path) -> None:
    model = tiny_llama().eval()
    layer = ["input_layernorm", "self_attn", "post_attention_layernorm", "mlp"]
    layers = [f"model.layers.{index}.{name}" for index in range(2) for name in layer]
    order = ["model.embed_tokens", *layers, "model.norm", "lm_head"]
    with attach(model, budget=ALL, spill_dir=tmp_path) as runtime:
        total, forwards = runtime.plan.fast_bytes, runtime._forwards
        for budget in (total, total * 3 // 4, total // 2, None):
            runtime.budget = {"HBM": budget, "SSD": None}
            for _ in range(2):
                logits(model)
                assert [step.block for step in forwards.schedule] == order
                assert forwards.schedule == forwards.expected


@pytest.mark.parametrize("precision", ["int8", "int4", "int3"])
def test_a_resident_compressed_layer_computes_what_its_weight_does(
    precision: str, tmp_path: Path
) -> None:
    model = layers()
    least = smallest(model, precision)
    with torch.no_grad():
        expected = model(X)
        with attach(model, budget=ALL, precision=precision, spill_dir=tmp_path) as runtime:
            assert with_forwards(model) == ["0", "2"]
            for half in (None, torch.bfloat16):
                with torch.autocast("cpu", dtype=half, enabled=half is not None):
                    linear = F.linear(X, model[0].weight, model[0].bias)
                    assert torch.equal(model[0](input=X), linear)
                    assert torch.equal(model[2](X), torch.addmm(model[2].bias, X, model[2].weight))
            found = model(X)
            weights = {"0.weight": torch.eye(64), "0.bias": torch.zeros(64)}
            assert torch.equal(torch.func.functional_call(model, weights, X), model[1:](X))
            plain = F.linear(X, model[0].weight + 0.0, model[0].bias)
            assert torch.allclose(torch.func.vmap(model[0])(X), plain, atol=1e-5)
            runtime.budget = {"HBM": least, "SSD": None}
            assert with_forwards(model) != ["0", "2"]
            assert (model(X) - found).abs().max() < 0.1
            runtime.budget = ALL
            assert torch.equal(model(X), found)
        assert not with_forwards(model)
        assert torch.equal(model(X), expected)


def test_an_embedding_and_its_tied_head_look_up_and_multiply_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = GPT2Config(n_layer=1, n_embd=64, n_head=2, vocab_size=80, n_positions=8)
    model = GPT2LMHeadModel(config).eval()
    with attach(model, budget=ALL, precision="int8", spill_dir=tmp_path):
        assert len(with_forwards(model)) == 7
        expected = logits(model)
        asked: list[Any] = []
        ask = OffloadedParameter.__torch_function__.__func__  # type: ignore[attr-defined]

        def spy(cls: Any, func: Any, *args: Any) -> Any:
            asked.append(func)
            return ask(cls, func, *args)

        monkeypatch.setattr(OffloadedParameter, "__torch_function__", classmethod(spy))
        assert torch.equal(logits(model), expected)
        assert not asked


def test_a_forward_of_a_user_s_is_left_alone(tmp_path: Path) -> None:
    model = layers()
    own: Callable[[Tensor], Tensor] = lambda x: 3 * nn.Linear.forward(model[0], x)  # noqa: E731
    model[0].forward = own  # type: ignore[method-assign, assignment]
    with attach(model, budget=ALL, precision="int8", spill_dir=tmp_path), torch.no_grad():
        assert torch.equal(model[0](X), 3 * F.linear(X, model[0].weight, model[0].bias))
        model[2].forward = own  # type: ignore[method-assign, assignment]
    assert model[0].forward is own and model[2].forward is own


def test_gradients_of_a_resident_compressed_layer_are_refused(tmp_path: Path) -> None:
    model = layers()
    with attach(model, budget=ALL, precision="int8", spill_dir=tmp_path):
        assert not model[2](model[1](model[0](X))).requires_grad
        assert not model(X).requires_grad
        with pytest.raises(PlacementError, match=r"torch\.no_grad"):
            model[0](X.clone().requires_grad_(True))


class Decoded:
    """A kernel of plain operations, which a compiler can trace."""

    name = "decoded"
    linear_error, decoding_error, looks_up = 0.1, 0.1, True

    def __init__(self, layout: RecordLayout, dtype: torch.dtype) -> None:
        self.shape, self.dtype = (layout.rows, layout.cols), dtype
        self.values = torch.zeros(self.shape)
        self.num_bytes = self.planned_bytes(layout)

    @classmethod
    def supports(cls, layout: RecordLayout, uses: object, device: object) -> bool:
        return True

    @classmethod
    def planned_bytes(cls, layout: RecordLayout) -> int:
        return 4 * layout.rows * layout.cols

    @classmethod
    def allocate(cls, layout: RecordLayout, *, dtype: torch.dtype, **options: Any) -> "Decoded":
        return cls(layout, dtype)

    def fill(self, start_row: int, record: Tensor, layout: RecordLayout) -> None:
        self.values[start_row : start_row + layout.rows] = decode(record, layout)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, self.values, bias)

    def rows(self, ids: Tensor) -> Tensor:
        return self.values[ids]

    def expand(self, start_row: int, end_row: int) -> Tensor:
        return self.values[start_row:end_row].clone()


def compiled(model: nn.Module, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="eager", fullgraph=True, **options)


def test_a_resident_model_compiles_until_weights_move(tmp_path: Path) -> None:
    model = tiny_llama().eval()
    expected = logits(model)
    with attach(model, budget=ALL, spill_dir=tmp_path) as runtime:
        call = compiled(model)
        assert torch.equal(logits(call), expected)
        runtime.budget = {"HBM": runtime.plan.fast_bytes * 3 // 4, "SSD": None}
        with pytest.raises(PlacementError, match=r"torch\.compile"):
            logits(call)
        assert torch.equal(logits(model), expected)
        runtime.budget = ALL
        assert torch.equal(logits(call), expected)
    assert torch.equal(logits(call), expected)


@pytest.mark.filterwarnings("ignore:.*stay as they are")
def test_a_compressed_resident_model_compiles_without_breaks(tmp_path: Path) -> None:
    model = tiny_llama().eval()
    expected = logits(model)
    with KERNELS.restored():
        register_kernel(Decoded)
        least = smallest(model, "int8")
        with attach(model, budget=ALL, precision="int8", spill_dir=tmp_path) as runtime:
            rounded = logits(model)
            call = compiled(model)
            for _ in range(2):
                assert torch.equal(logits(call), rounded)
            runtime.budget = {"HBM": least, "SSD": None}
            with pytest.raises(PlacementError, match=r"torch\.compile"):
                logits(call)
            runtime.budget = ALL
            assert torch.equal(logits(call), rounded)
    assert torch.equal(logits(call), expected)


def test_model_compile_is_undone_where_weights_move_and_at_detach(tmp_path: Path) -> None:
    model = tiny_llama().eval()
    expected = logits(model)
    torch._dynamo.reset()
    with attach(model, budget=ALL, spill_dir=tmp_path) as runtime:
        model.compile(backend="eager", fullgraph=True)
        assert torch.equal(logits(model), expected)
        with pytest.warns(RuntimeWarning, match=r"model\.compile"):
            runtime.budget = {"HBM": runtime.plan.fast_bytes * 3 // 4, "SSD": None}
        assert model._compiled_call_impl is None
        assert torch.equal(logits(model), expected)
        runtime.budget = ALL
        model.model.compile(backend="eager", fullgraph=True)
        assert torch.equal(logits(model), expected)
    assert model.model._compiled_call_impl is None
    assert torch.equal(logits(model), expected)
