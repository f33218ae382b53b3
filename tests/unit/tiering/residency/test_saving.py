"""What is saved of an attached model: each weight once, with the bits that were given, in memory of
its own.
"""

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from tiny_models import tiny_gpt2, tiny_llama, tiny_mixtral
from torch import Tensor, nn

from lib.blocks import partition_model
from lib.errors import PlacementError
from lib.evaluation.forwards import peak_rss, reset_peak_rss
from lib.tiering import attach, empty_weights
from lib.tiering.residency.stand_ins import OffloadedParameter


class Mixed(nn.Module):
    """Shards of rows that are tied, a slot for several weights, and strides that are transposed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20_000, 128)
        self.mix = nn.LSTM(128, 128, batch_first=True)
        self.turn = nn.Linear(128, 128, dtype=torch.bfloat16)
        self.turn.weight = nn.Parameter(self.turn.weight.detach().t())
        self.register_buffer("seen", torch.arange(3))
        self.head = nn.Linear(128, 20_000, bias=False)
        self.head.weight = self.embed.weight


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mixed": Mixed,
    "gpt2": tiny_gpt2,
    "llama": tiny_llama,
    "mixtral": tiny_mixtral,
}
PLACES = ["streamed", "resident", "emulated", "checkpoint", "promoted"]
EVERYTHING = {"HBM": None, "SSD": None}


@contextmanager
def attached(build: Callable[[], nn.Module], place: str, folder: Path) -> Iterator[nn.Module]:
    """Yield a model with all weights away, or all in fast memory."""
    model = build()
    hints = {block.name: "SSD" for block in partition_model(model)}
    options: dict[str, Any] = {"spill_dir": folder / "spill"}
    if place == "emulated":
        options = {"mode": "emulated"}
    elif place == "checkpoint":
        save_model(model, str(folder / "model.safetensors"))
        options |= {"weights": folder / "model.safetensors"}
        with empty_weights():
            model = build()
    given: Any = None if place == "resident" else hints
    if place == "resident":
        options |= {"budget": EVERYTHING}
    with attach(model.eval(), given, **options) as runtime:
        if place == "promoted":
            runtime.budget = EVERYTHING
        yield model


def own_bytes(tensors: Iterable[Tensor]) -> int:
    """Add up what the tensors hold in memory; shared memory counts once."""
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return list(found) == list(expected) and all(
        torch.equal(value, expected[name])
        and value.dtype == expected[name].dtype
        and value.stride() == expected[name].stride()
        for name, value in found.items()
    )


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", MODELS)
def test_a_state_dict_has_each_weight_once_in_memory_of_its_own(
    name: str, place: str, tmp_path: Path
) -> None:
    expected = MODELS[name]().state_dict()
    with attached(MODELS[name], place, tmp_path) as model:
        state = model.state_dict()
        assert same(state, expected)
        assert own_bytes(state.values()) == own_bytes(expected.values())
        assert all(value.untyped_storage().nbytes() == value.nbytes for value in state.values())
        assert all(type(value) is Tensor and not value.is_inference() for value in state.values())
        again = model.state_dict()
        assert own_bytes([*state.values(), *again.values()]) == own_bytes(expected.values())
        prefixed = model.state_dict(prefix="model.")
        assert list(prefixed) == [f"model.{name}" for name in expected]
        for path, child in model.named_children():
            found = {f"{path}.{name}": value for name, value in child.state_dict().items()}
            assert same(found, {name: expected[name] for name in found})
        with torch.inference_mode():
            assert same(model.state_dict(), expected)
        kept = model.state_dict(keep_vars=True)
        ids = {id(parameter) for parameter in model.parameters()}
        assert {id(kept[name]) for name, _ in model.named_parameters()} == ids
        assert all(torch.equal(kept[name], value) for name, value in expected.items())
    assert same(state, expected)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", MODELS)
def test_saved_files_have_the_size_and_the_weights_of_the_model(
    name: str, place: str, tmp_path: Path
) -> None:
    plain = MODELS[name]()
    expected, size = plain.state_dict(), own_bytes(plain.state_dict().values())
    slack = 2**12 + 2**9 * len(expected)  # headers
    with attached(MODELS[name], place, tmp_path) as model:
        torch.save(model.state_dict(), tmp_path / "model.pt")
        save_model(model, str(tmp_path / "out.safetensors"))
        cloned = {name: value.contiguous() for name, value in model.state_dict().items()}
        if name == "llama":  # nothing is tied
            save_file(model.state_dict(), tmp_path / "file.safetensors")
            assert same(load_file(tmp_path / "file.safetensors"), dict(sorted(expected.items())))
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(tmp_path / "whole")
            model.save_pretrained(tmp_path / "shards", max_shard_size=size // 3)
    assert size < (tmp_path / "model.pt").stat().st_size < size + slack
    assert size < (tmp_path / "out.safetensors").stat().st_size < size + slack
    assert same(torch.load(tmp_path / "model.pt"), expected)
    saved = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(value, cloned[name]) for name, value in saved.items())
    for folder in ("whole", "shards") if hasattr(plain, "save_pretrained") else ():
        files = list((tmp_path / folder).glob("*.safetensors"))
        assert len(files) > 1 or folder == "whole"
        assert sum(file.stat().st_size for file in files) < size + len(files) * slack
        loaded = type(plain).from_pretrained(tmp_path / folder)  # type: ignore[attr-defined]
        assert same(loaded.state_dict(), expected)


KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "data": lambda weight: weight.data,
    "detach": lambda weight: weight.detach(),
    "cast": lambda weight: weight.to(torch.float64),
}


@pytest.mark.parametrize("place", ["streamed", "emulated"])
@pytest.mark.parametrize("name", ["mixed", "mixtral"])
@pytest.mark.parametrize("way", KEPT)
def test_what_is_kept_of_a_weight_takes_its_own_bytes(
    way: str, name: str, place: str, tmp_path: Path
) -> None:
    expected = {name: KEPT[way](value) for name, value in MODELS[name]().named_parameters()}
    with attached(MODELS[name], place, tmp_path) as model, torch.no_grad():
        away = [n for n, each in model.named_parameters() if isinstance(each, OffloadedParameter)]
        assert len(away) > 4
        kept = {name: KEPT[way](model.get_parameter(name)) for name in away}
        assert all(torch.equal(value, expected[name]) for name, value in kept.items())
        assert own_bytes(kept.values()) == sum(value.nbytes for value in kept.values())


@pytest.mark.parametrize("place", ["streamed", "checkpoint"])
def test_saving_takes_the_memory_of_the_state_and_little_more(place: str, tmp_path: Path) -> None:
    if not reset_peak_rss():
        pytest.skip("this system does not reset VmHWM")

    def build() -> nn.Module:
        torch.manual_seed(0)
        layers = [nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(4))) for _ in range(3)]
        return nn.Sequential(nn.Embedding(4096, 1024), *layers)

    with attached(build, place, tmp_path) as model:
        del build
        gc.collect()
        reset_peak_rss()
        before = peak_rss()
        state = model.state_dict()
        size = own_bytes(state.values())
        torch.save(state, tmp_path / "model.pt")
        assert size == 64 * 2**20 + 12 * 4096
        assert peak_rss() - before < size + 8 * 2**20


def test_a_write_to_a_state_dict_is_noticed(tmp_path: Path) -> None:
    model = tiny_gpt2()
    hints = {block.name: "SSD" for block in partition_model(model)}
    runtime = attach(model, hints, spill_dir=tmp_path)
    state = model.state_dict()
    state["lm_head.weight"].zero_()
    with torch.no_grad(), pytest.raises(PlacementError, match="wte were written to"):
        model(torch.arange(4)[None])
    with pytest.raises(PlacementError, match="wte were written to"):
        model.state_dict()
    with pytest.warns(RuntimeWarning, match="wte while they were away is lost"):
        runtime.detach()
    assert same(model.state_dict(), tiny_gpt2().state_dict())


def test_a_state_dict_has_what_was_written_to_resident_weights_since(tmp_path: Path) -> None:
    model = tiny_llama()
    hints = {block.name: "SSD" for block in partition_model(model)}
    with attach(model, hints, spill_dir=tmp_path) as runtime, torch.no_grad():
        before = model.state_dict()
        tiers = runtime.budget or {"SSD": None}
        runtime.budget = EVERYTHING
        model.model.norm.weight.fill_(2)
        runtime.budget = tiers | {"HBM": "64KiB"}
        after = model.state_dict()
        assert torch.equal(after["model.norm.weight"], torch.full((32,), 2.0))
        del after["model.norm.weight"], before["model.norm.weight"]
        assert same(after, before)
