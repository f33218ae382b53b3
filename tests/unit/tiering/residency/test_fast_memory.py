"""Fast memory in unusual uses: weights that are expanded whole, embeddings that are multiplied
with, and what compression leaves as it is.
"""

import warnings
from pathlib import Path

import pytest
import torch
from smallest_budget import named, smallest
from torch import Tensor, nn
from torch.nn import functional as F

from lib.errors import PlacementError
from lib.tiering import attach


class Signal(nn.Module):
    """Convolutions, whose codecs have no kernel: each use expands a weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Conv1d(256, 256, 15, padding=7) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize(
    ("model", "given"),
    [
        (Signal(), torch.ones(1, 256, 8)),
        (nn.Sequential(nn.Linear(256, 256), nn.LSTM(256, 256)), torch.ones(4, 1, 256)),
        (
            nn.Sequential(nn.TransformerEncoderLayer(256, 4, 512, batch_first=True)),
            torch.ones(1, 4, 256),
        ),
    ],
    ids=["convolution", "lstm", "attention"],
)
@pytest.mark.parametrize("resident", [True, False])
def test_weights_that_are_expanded_whole_stay_within_the_budget(
    model: nn.Module, given: Tensor, resident: bool, tmp_path: Path
) -> None:
    model.eval()

    def run() -> Tensor:
        with torch.no_grad():
            found = model(given)
        return found[0] if isinstance(found, tuple) else found

    expected = run()
    budget = {"HBM": None if resident else smallest(model, "int8"), "SSD": None}
    with attach(model, budget=budget, precision="int8", spill_dir=tmp_path) as runtime:
        found = run()
        assert torch.equal(run(), found)
        stats = runtime.stats()
        assert stats.peak_resident_bytes <= runtime.plan.fast_bytes
    assert (found - expected).std() < 0.05 * expected.std()
    assert torch.equal(run(), expected)


class Functional(nn.Module):
    """Multiplies with an embedding, without a module for it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9000, 64)
        self.body = nn.Linear(64, 64)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.body(self.embed(ids)), self.embed.weight)


def test_an_embedding_that_is_multiplied_with_gets_a_slot_after_the_first_forward(
    tmp_path: Path,
) -> None:
    model, ids = Functional(), torch.tensor([[1, 8999]])
    with torch.no_grad():
        expected = model(ids)
        budget = {"HBM": "2900KiB", "SSD": None}
        with attach(model, budget=budget, spill_dir=tmp_path) as runtime:
            runtime.budget = {"HBM": "700KiB", "SSD": None}
            runtime.reset_stats()
            with pytest.warns(RuntimeWarning, match="above the budget"):
                assert torch.equal(model(ids), expected)
            assert runtime.stats().peak_resident_bytes <= 700 * 2**10
            runtime.budget = budget
            for _ in range(3):
                assert torch.equal(model(ids), expected)
                assert runtime.plan.fast_bytes <= 2900 * 2**10
            runtime.reset_stats()
            assert torch.equal(model(ids), expected)
            assert runtime.stats().peak_resident_bytes <= runtime.plan.fast_bytes


def test_an_embedding_whose_rows_are_too_long_for_pieces_is_refused_by_name(tmp_path: Path) -> None:
    model = Functional()
    model.embed, model.body = nn.Embedding(900, 300), nn.Linear(300, 300)
    ids = torch.tensor([[1, 899]])
    with torch.no_grad():
        expected = model(ids)
        budget = {"HBM": smallest(model, None), "SSD": None}
        with attach(model, budget=budget, spill_dir=tmp_path) as runtime:
            with pytest.raises(PlacementError, match="embed are needed whole") as refusal:
                model(ids)
            assert runtime.stats().peak_resident_bytes <= runtime.plan.fast_bytes
            runtime.budget = {"HBM": named(refusal.value), "SSD": None}
            assert torch.equal(model(ids), expected)
            assert runtime.stats().peak_resident_bytes <= runtime.plan.fast_bytes


class Picture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Conv2d(64, 64, size, padding=size // 2) for size in (1, 3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_convolutions_are_compressed_along_their_inputs(
    memory_format: torch.memory_format, tmp_path: Path
) -> None:
    model = Picture().to(memory_format=memory_format)
    x = torch.randn(1, 64, 8, 8)
    with torch.no_grad():
        expected = model(x)
        budget = {"HBM": None, "SSD": None}
        with attach(model, budget=budget, precision="int8", spill_dir=tmp_path) as runtime:
            placed = runtime.plan.placements
            assert {str(placement.precision) for placement in placed.values()} == {"int8"}
            assert placed["layers.1"].resident_bytes < 64 * 64 * 9 * 4 / 3
            found = model(x)
        assert (found - expected).std() < 0.03 * expected.std()
        assert not torch.equal(found, expected)


def test_weights_that_compression_would_not_make_smaller_are_named(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(1, 64), nn.Linear(64, 64))
    budget = {"HBM": None, "SSD": None}
    with pytest.warns(UserWarning, match=r"256 B of weights stay as they are.*'0\.weight'"):
        attach(model, budget=budget, precision="int8", spill_dir=tmp_path).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(model[1], budget=budget, precision="int8", spill_dir=tmp_path).detach()
