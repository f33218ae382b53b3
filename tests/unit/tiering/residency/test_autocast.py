"""Under autocast: the untouched model's outputs and dtypes, and no more memory than the budget."""

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_gpt2, tiny_mixtral
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DebertaV2Config, DebertaV2Model, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from lib.blocks import partition_model
from lib.errors import InputError
from lib.tiering import Runtime, attach
from lib.tiering.payload import layout as payload

pytestmark = pytest.mark.filterwarnings("ignore:flat hints")

IDS = torch.arange(12).reshape(2, 6) % 10
HALVES = [torch.bfloat16, torch.float16]


def _llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=40,
        )
    )


class Decorated(nn.Module):
    """Enters autocast by itself, in a parent and in a leaf, takes a child's weight, and leaves
    it for one of its children.
    """

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(64, 300), nn.LayerNorm(300), nn.Linear(300, 64))
        self.taken = nn.Linear(64, 64, bias=False)
        self.full = nn.Linear(64, 64)

    @torch.autocast("cpu", dtype=torch.bfloat16)
    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(self.inner(x), self.taken.weight)
        with torch.autocast("cpu", enabled=False):
            return self.full(x.float())


class Head(nn.Module):
    """A tied head that moves by rows, in several shards."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(700, 64)
        self.head = nn.Linear(64, 700, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "gpt2": (tiny_gpt2, IDS),
    "llama": (_llama, IDS),
    "mixtral": (tiny_mixtral, IDS),
    "decorated": (Decorated, torch.randn(2, 3, 64)),
    "tied head": (Head, IDS),
    "conv": (lambda: nn.Conv1d(16, 32, 3), torch.randn(2, 16, 9)),
    "rnn": (lambda: nn.GRUCell(16, 16), torch.randn(2, 16)),
}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payload, "_PART_BYTES", 1)


def _output(model: Any, x: Tensor) -> Tensor:
    result = model(x)
    return result if isinstance(result, Tensor) else result.logits


def _away(model: nn.Module) -> dict[str, str]:
    return {block.name: "SSD" for block in partition_model(model)}


def _smallest(model: nn.Module) -> dict[str, str | int | None]:
    """Name a budget little above the smallest, with room for copies of weights."""
    total = sum(parameter.nbytes for parameter in model.parameters())
    for share in range(1, 64):
        budget: dict[str, str | int | None] = {"HBM": total * share // 16, "SSD": None}
        try:
            attach(model, budget=budget).detach()
        except InputError:
            continue
        return {**budget, "HBM": total * (share + 16) // 16}
    raise AssertionError("no budget will do")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("place", ["away", "budget", "emulated", "all in memory"])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_under_autocast_are_the_untouched_model_s(
    name: str, place: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x = MODELS[name][0]().eval(), MODELS[name][1]
    given: dict[str, Any] = {"hints": _away(model), "spill_dir": tmp_path}
    if place == "budget":
        given = {"budget": _smallest(model), "spill_dir": tmp_path}
    elif place == "emulated":
        given = {"hints": _away(model), "mode": "emulated"}
    elif place == "all in memory":
        given = {"budget": {"HBM": None}}

    def outputs() -> list[Tensor]:
        found = []
        for cached in (True, False):
            with torch.autocast("cpu", dtype=dtype, cache_enabled=cached):
                found.append(_output(model, x))
                with torch.autocast("cpu", enabled=False):
                    found.append(_output(model, x))
                    with torch.autocast("cpu", dtype=dtype):
                        found.append(_output(model, x))
                assert torch.is_autocast_cache_enabled() == cached
        return [*found, _output(model, x)]

    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            expected = outputs()
            with attach(model, **given) as runtime:
                for here, there in zip(outputs(), expected, strict=True):
                    assert here.dtype == there.dtype
                    assert torch.equal(here, there)
                if place == "budget":
                    limit = runtime.budget["HBM"]
                    assert limit is not None
                    assert runtime.stats().peak_resident_bytes <= limit


@pytest.mark.parametrize("batch", [1, 3])
def test_a_generation_under_autocast_is_the_untouched_model_s(batch: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = tiny_gpt2().eval()
    ids = torch.arange(4 * batch).reshape(batch, 4)
    given = {"max_new_tokens": 4, "do_sample": False, "output_logits": True}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model.generate(ids, return_dict_in_generate=True, **given).logits
        with attach(model, budget=_smallest(model), spill_dir=tmp_path):
            found = model.generate(ids, return_dict_in_generate=True, **given).logits
    assert all(map(torch.equal, found, expected))


def _memory() -> int:
    ctypes.CDLL(None).malloc_trim(0)
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


class Leaf(nn.Linear):
    """Enters autocast by itself."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=True):
            return super().forward(x)


@pytest.mark.parametrize("budget", ["10MiB", "70MiB", None])
@pytest.mark.parametrize("kind", [nn.Linear, Leaf])
def test_no_copies_of_weights_are_kept(
    kind: type[nn.Linear], budget: str | None, tmp_path: Path
) -> None:
    model = nn.Sequential(*[kind(1024, 1024) for _ in range(16)]).eval()  # 64 MiB, copies 32
    x = torch.zeros(2, 1024)
    with (
        torch.no_grad(),
        attach(model, budget={"HBM": budget, "SSD": None}, spill_dir=tmp_path),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        model[:2](x)
        model(x)
        before = _memory()
        model(x)
        assert _memory() - before < 6 * 2**20
        torch.clear_autocast_cache()
        assert before - _memory() < 6 * 2**20


def test_a_budget_without_room_for_the_copies_is_refused_with_one_that_has(
    tmp_path: Path,
) -> None:
    model, x = nn.Sequential(*[nn.Linear(64, 64) for _ in range(8)]).eval(), torch.randn(1, 64)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected_half = model(x)
        runtime: Runtime = attach(model, budget={"HBM": "20KiB", "SSD": None}, spill_dir=tmp_path)
        with runtime:
            for _ in range(2):
                with (
                    torch.autocast("cpu", dtype=torch.bfloat16),
                    pytest.raises(
                        InputError, match="autocast makes a copy.*smallest that works is HBM=29KiB"
                    ),
                ):
                    model(x)
                assert torch.equal(model(x), expected)
            runtime.budget = {"HBM": "30KiB", "SSD": None}
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert torch.equal(model(x), expected_half)
            assert runtime.stats().peak_resident_bytes <= 30 * 1024


def test_copies_that_a_model_s_own_autocast_makes_are_within_the_budget(tmp_path: Path) -> None:
    model, x = Decorated().eval(), torch.randn(1, 64)
    with torch.no_grad(), attach(model, budget=_smallest(model), spill_dir=tmp_path) as runtime:
        before = runtime.plan.scratch_bytes
        for _ in range(3):  # from the first forward on
            model(x)
            assert runtime.stats().peak_resident_bytes <= (runtime.budget["HBM"] or 0)
        assert runtime.plan.scratch_bytes > before


LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(128, 192), torch.randn(2, 128)),
    "without a bias": (lambda: nn.Linear(128, 192, bias=False), torch.randn(3, 5, 128)),
    "Conv1D": (lambda: Conv1D(192, 128), torch.randn(2, 3, 128)),
    "embedding": (lambda: nn.Embedding(192, 128), IDS),
    "convolution": (lambda: nn.Conv1d(64, 64, 3), torch.randn(2, 64, 9)),
    "tied head": (Head, IDS),
}


@pytest.mark.parametrize("precision", ["int8", "int6", "int4", "int3", "bf16", "fp16"])
@pytest.mark.parametrize("tier", ["SSD", "HBM"])
@pytest.mark.parametrize("name", LAYERS)
def test_compressed_weights_compute_in_the_dtype_of_autocast(
    name: str, tier: str, precision: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x = LAYERS[name][0]().eval(), LAYERS[name][1]
    dtypes = (torch.float32, torch.bfloat16, torch.float16) if x.is_floating_point() else (x.dtype,)
    hints = {block.name: tier for block in partition_model(model)}
    for half in HALVES:
        with torch.no_grad(), torch.autocast("cpu", dtype=half):
            expected = [model(x.to(dtype)) for dtype in dtypes]
            with attach(model, hints, precision=precision, spill_dir=tmp_path):
                for dtype, there in zip(dtypes, expected, strict=True):
                    here = model(x.to(dtype))
                    assert here.dtype == there.dtype
                    assert (here - there).float().norm() < 0.5 * there.float().norm()


@pytest.mark.filterwarnings("ignore:.*stay as they are")
@pytest.mark.parametrize("precision", ["int8", "int6", "bf16"])
def test_models_that_look_at_the_dtype_of_activations_run_compressed(
    precision: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=100,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=128,
    )
    model = DebertaV2Model(config).eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(IDS).last_hidden_state
        budget = {"HBM": None, "SSD": None}
        with attach(model, budget=budget, precision=precision, spill_dir=tmp_path):
            found = model(IDS).last_hidden_state
    assert found.dtype == expected.dtype
    assert F.cosine_similarity(found.float(), expected.float(), dim=-1).min() > 0.9
