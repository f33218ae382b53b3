"""What is written to weights while a runtime holds them is kept, refused or told, not forgotten."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lib.errors import InputError, PlacementError
from lib.tiering import attach, empty_weights

SMALL = {"HBM": "20KiB", "SSD": None}
LARGE = {"HBM": None, "SSD": None}
X = torch.linspace(-1, 1, 2 * 64).reshape(2, 64)


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 64, bias=False), nn.LayerNorm(64), nn.Linear(64, 64, bias=False)
    )


REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "out=": lambda weight: torch.add(weight, 1, out=weight),
    "a list": lambda weight: torch._foreach_mul_([weight], 2),
    "in place": lambda weight: weight.mul_(2),
    "an item": lambda weight: weight.__setitem__(0, 1.0),
}
THROUGH_AN_ALIAS: dict[str, Callable[[Tensor], Any]] = {
    "data": lambda weight: weight.data.mul_(2),
    "detach": lambda weight: weight.detach().mul_(2),
    "a view": lambda weight: weight[0].zero_(),
}


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("name", REFUSED)
def test_writing_to_weights_that_are_away_is_refused(name: str, index: int, tmp_path: Path) -> None:
    model = layers()
    with torch.no_grad():
        expected = model(X)
        with attach(model, dict.fromkeys("012", "SSD"), spill_dir=tmp_path):
            with pytest.raises(PlacementError, match="detach"):
                REFUSED[name](model[index].weight)
            assert torch.equal(model(X), expected)


@pytest.mark.parametrize("precision", [None, "int8"])
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("name", THROUGH_AN_ALIAS)
def test_a_write_through_an_alias_stops_the_model_and_detach_tells_it(
    name: str, index: int, precision: str | None, tmp_path: Path
) -> None:
    model = layers()
    with torch.no_grad():
        expected = model(X)
        hints = dict.fromkeys("012", "HBM" if precision and index == 0 else "SSD")
        runtime = attach(model, hints, precision=precision, spill_dir=tmp_path)
        model(X)
        THROUGH_AN_ALIAS[name](model[index].weight)
        for _ in range(2):
            with pytest.raises(PlacementError, match=f"weights of {index} were written to"):
                model(X)
        with pytest.warns(RuntimeWarning, match=f"weights of {index} while they were away"):
            runtime.detach()
        assert torch.equal(model(X), expected)


@pytest.mark.parametrize(
    "write", [lambda weight: weight.data.mul_(2), lambda weight: weight.detach().numpy().fill(2)]
)
def test_what_is_written_to_resident_weights_survives_a_smaller_budget_and_detach(
    write: Callable[[Tensor], Any], tmp_path: Path
) -> None:
    model = layers()
    with torch.no_grad():
        before = model(X)
        runtime = attach(model, budget=SMALL, spill_dir=tmp_path)
        runtime.budget = LARGE
        write(model[0].weight)
        expected = model(X)
        assert not torch.equal(expected, before)
        runtime.budget = SMALL
        assert torch.equal(model(X), expected)
        runtime.detach()
        assert torch.equal(model(X), expected)


def test_a_checkpoint_s_weights_that_were_changed_are_refused(tmp_path: Path) -> None:
    save_file(layers().state_dict(), tmp_path / "model.safetensors")
    with empty_weights():
        model = layers()
    with attach(
        model, budget=LARGE, weights=tmp_path / "model.safetensors", spill_dir=tmp_path
    ) as runtime:
        with torch.no_grad():
            model[0].weight.data.mul_(2)
        with pytest.raises(PlacementError, match="were changed and are a checkpoint's"):
            runtime.budget = SMALL


def test_an_embedding_that_renormalizes_its_rows_stays_in_memory(tmp_path: Path) -> None:
    torch.manual_seed(0)
    embed = nn.Embedding(200, 64, max_norm=1.0)
    head = nn.Linear(64, 200, bias=False)
    head.weight = embed.weight
    model, ids = nn.Sequential(embed, nn.Linear(64, 64), head), torch.tensor([[3, 5], [7, 199]])
    with torch.no_grad():
        expected = model(ids)
        budget = {"HBM": "110KiB", "SSD": None}  # 50 KiB, the rest and 41 KiB of scratch
        with attach(model, budget=budget, precision="int8", spill_dir=tmp_path) as runtime:
            assert runtime.plan.placements["0"].reason == "must be resident"
            assert str(runtime.plan.placements["0"].precision) == "fp32"
            assert (model(ids) - expected).std() < 0.05 * expected.std()


class TestCompressed:
    def test_state_dict_of_compressed_weights_is_refused(self, tmp_path: Path) -> None:
        model = layers()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with attach(model, budget=LARGE, precision="int8", spill_dir=tmp_path):
            with pytest.raises(PlacementError, match="compressed"):
                model.state_dict()
            with pytest.raises(PlacementError, match="compressed"):
                model[2].state_dict()
            assert torch.equal(model[1].state_dict()["weight"], before["1.weight"])
        assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)

    @pytest.mark.parametrize("tier", ["HBM", "SSD"])
    def test_weights_that_detach_could_not_restore_compute_nothing(
        self, tier: str, tmp_path: Path
    ) -> None:
        model = layers()
        hints = dict.fromkeys("012", tier)
        runtime = attach(model, hints, precision="int8", spill_dir=tmp_path)
        key = runtime._keeper.residency.groups["0"].native[0][1]
        path = tmp_path / f"{key}.block"
        sound = path.read_bytes()
        path.write_bytes(sound[:-4096] + bytes([sound[-4096] ^ 255]) + sound[-4095:])
        with pytest.raises(PlacementError, match="detach again"):
            runtime.detach()
        with torch.no_grad(), pytest.raises(PlacementError, match="could not be restored"):
            model(X)
        with pytest.raises(PlacementError, match="was not restored"):
            attach(model, budget=LARGE)
        path.write_bytes(sound)
        runtime.detach()
        expected = layers()
        assert torch.equal(model(X), expected(X))

    def test_originals_need_a_tier_that_the_budget_names(self, tmp_path: Path) -> None:
        model = layers()
        with pytest.raises(InputError, match=r"originals.*name SSD.*weights="):
            attach(model, budget={"HBM": None}, precision="int8", spill_dir=tmp_path)
        with pytest.raises(InputError, match=r"SSD=1\.0 KiB is too small for the originals"):
            attach(model, budget={"HBM": None, "SSD": 1024}, precision="int8")
        assert not list(tmp_path.iterdir())
        budget = {"HBM": None, "SSD": "40KiB"}
        with attach(model, budget=budget, precision="int8", spill_dir=tmp_path) as runtime:
            assert runtime.plan.original_bytes == 2 * 64 * 64 * 4
            assert runtime.budget["SSD"] == 40 * 2**10
            with pytest.raises(InputError, match="originals"):
                runtime.budget = {"HBM": None}

    def test_a_checkpoint_is_compressed_into_memory_where_the_budget_names_no_disk(
        self, tmp_path: Path
    ) -> None:
        save_file(layers().state_dict(), tmp_path / "model.safetensors")
        found = []
        for budget in ({"HBM": None}, LARGE):
            spill = tmp_path / "spill"
            with empty_weights():
                model = layers()
            with (
                attach(
                    model,
                    budget=budget,
                    precision="int8",
                    weights=tmp_path / "model.safetensors",
                    spill_dir=spill,
                ),
                torch.no_grad(),
            ):
                found.append(model(X))
            assert spill.exists() == ("SSD" in budget)
        assert torch.equal(*found)
