"""Encoders take the path of the untouched model, which torch chooses by weights and hooks: other
paths have other bits, and other values at padded positions.
"""

import contextlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lib.blocks import partition_model
from lib.errors import InputError
from lib.tiering import attach
from lib.units import parse_bytes

pytestmark = [
    pytest.mark.filterwarnings("ignore:flat hints"),
    pytest.mark.filterwarnings("ignore:.*nested tensors"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor"),
    pytest.mark.filterwarnings("ignore:.*stay as they are"),
]

WIDTH = 32
X = torch.randn(3, 8, WIDTH, generator=torch.Generator().manual_seed(1))
LENGTHS = torch.tensor([[8], [5], [2]])
MASKS: dict[str, Tensor | None] = {
    "no mask": None,
    "padded at the end": torch.arange(8)[None] >= LENGTHS,
    "padded in front": torch.arange(8)[None] < 8 - LENGTHS,
}


def _layer(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(WIDTH, 4, 64, batch_first=True, **options)


class Classifier(nn.Module):
    """A user's model around an encoder."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.encoder = nn.TransformerEncoder(_layer(**options), 3, norm=nn.LayerNorm(WIDTH))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor, src_key_padding_mask: Tensor | None = None) -> Tensor:
        x = self.encoder(self.embed(x), src_key_padding_mask=src_key_padding_mask)
        return self.head(x.mean(1))


class Attention(nn.Module):
    """Attention by itself, inside a block of its own name."""

    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"inner": nn.MultiheadAttention(WIDTH, 4, batch_first=True)})
        self.need_weights = need_weights

    def forward(self, x: Tensor, src_key_padding_mask: Tensor | None = None) -> Tensor:
        found, weights = self.attention["inner"](
            x, x, x, key_padding_mask=src_key_padding_mask, need_weights=self.need_weights
        )
        return found if weights is None else found + weights[..., :1]


class Whole(nn.Module):
    """Encoder and decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Transformer(WIDTH, 4, 2, 2, 64, batch_first=True)

    def forward(self, x: Tensor, src_key_padding_mask: Tensor | None = None) -> Tensor:
        return self.inner(x, x[:, :4], src_key_padding_mask=src_key_padding_mask)


def _hooked() -> nn.Module:
    model = nn.TransformerEncoder(_layer(), 2)
    model.layers[1].register_forward_hook(lambda module, args, output: output * 2)
    return model


def _shared() -> nn.Module:
    model = nn.TransformerEncoder(_layer(), 2)
    model.layers[1] = model.layers[0]
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "encoder": lambda: nn.TransformerEncoder(_layer(), 2),
    "encoder, norm first": lambda: nn.TransformerEncoder(_layer(norm_first=True), 2),
    "encoder, gelu": lambda: nn.TransformerEncoder(_layer(activation="gelu"), 2),
    "encoder, not nested": lambda: nn.TransformerEncoder(_layer(), 2, enable_nested_tensor=False),
    "encoder with a user's hook": _hooked,
    "encoder that runs a layer twice": _shared,
    "layer": _layer,
    "layer in a model": Classifier,
    "layer without biases": lambda: nn.TransformerEncoder(_layer(bias=False), 2),
    "attention": lambda: Attention(need_weights=False),
    "attention with weights": lambda: Attention(need_weights=True),
    "encoder and decoder": Whole,
}
PLACES = ("away", "mixed", "budget", "emulated", "all in memory")


def _given(model: nn.Module, place: str, tmp_path: Path) -> dict[str, Any]:
    names = [block.name for block in partition_model(model)]
    if place == "away":
        return {"hints": dict.fromkeys(names, "SSD"), "spill_dir": tmp_path}
    if place == "mixed":
        tiers = {name: ("HBM", "SSD")[index % 2] for index, name in enumerate(names)}
        return {"hints": tiers, "spill_dir": tmp_path}
    if place == "emulated":
        return {"hints": dict.fromkeys(names, "SSD"), "mode": "emulated"}
    return {
        "budget": {"HBM": None if place == "all in memory" else _smallest(model), "SSD": None},
        "spill_dir": tmp_path,
    }


def _smallest(model: nn.Module, precision: str | None = None) -> int:
    """Return the least HBM budget, as the refusal of a smaller one names it."""
    with pytest.raises(InputError) as refusal:
        attach(model, budget={"HBM": 0, "SSD": None}, precision=precision)
    match = re.search(r"works is HBM=(\S+)", str(refusal.value))
    assert match is not None
    return parse_bytes(match[1])


def _run(model: nn.Module, mask: Tensor | None) -> Tensor:
    return model(X) if mask is None else model(X, src_key_padding_mask=mask)


def _equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.nan_to_num(7), other.nan_to_num(7))


def _make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().eval()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", MODELS)
def test_encoders_have_the_untouched_model_s_bits(
    name: str, mask: str, place: str, tmp_path: Path
) -> None:
    model = _make(name)

    def outputs() -> dict[str, Tensor]:
        found = {"with gradients": _run(model, MASKS[mask]).detach()}
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                found[mode.__name__] = _run(model, MASKS[mask])
                with (
                    torch.autocast("cpu", dtype=torch.bfloat16),
                    contextlib.suppress(RuntimeError),  # torch can't always: see what is found
                ):
                    found[f"autocast, {mode.__name__}"] = _run(model, MASKS[mask])
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with torch.no_grad():
                found["slow path"] = _run(model, MASKS[mask])
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        return found

    expected, attributes = outputs(), [set(module.__dict__) for module in model.modules()]
    given = _given(model, place, tmp_path)
    if "budget" in given and place != "all in memory":
        given["budget"]["HBM"] *= 2  # of it are the copies that autocast makes
    with attach(model, **given) as runtime:
        found = outputs()
        assert {key: value.dtype for key, value in found.items()} == {
            key: value.dtype for key, value in expected.items()
        }
        torch.testing.assert_close(
            found.pop("with gradients"), expected["with gradients"], equal_nan=True
        )
        wrong = [key for key in found if not _equal(found[key], expected[key])]
        assert not wrong
        if place == "budget":
            assert runtime.stats().peak_resident_bytes <= (runtime.budget["HBM"] or 0)
    assert [set(module.__dict__) for module in model.modules()] == attributes
    with torch.no_grad():
        assert _equal(_run(model, MASKS[mask]), expected["no_grad"])


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("place", ["away", "budget"])
@pytest.mark.parametrize("mask", ["no mask", "padded at the end"])
@pytest.mark.parametrize("name", MODELS)
def test_compressed_encoders_take_the_untouched_model_s_path(
    name: str, mask: str, place: str, precision: str, tmp_path: Path
) -> None:
    model = _make(name)
    with torch.no_grad():
        expected = _run(model, MASKS[mask])
        given = _given(model, place, tmp_path)
        if place == "budget":
            given["budget"]["HBM"] = _smallest(model, precision)
        with attach(model, **given, precision=precision) as runtime:
            found = _run(model, MASKS[mask])
            assert torch.equal(_run(model, MASKS[mask]), found)
            if place == "budget":
                assert runtime.stats().peak_resident_bytes <= (runtime.budget["HBM"] or 0)
    if found.shape == expected.shape == X.shape and mask != "no mask":
        assert torch.equal(found == 0, expected == 0)  # what padding is filled with
    assert (found - expected).std() < 0.3 * expected.std()


def test_a_layer_is_one_block_and_its_forward_keeps_its_signature(tmp_path: Path) -> None:
    model = _make("encoder")
    signature = inspect.signature(model.layers[0].forward)
    assert [block.name for block in partition_model(model)] == ["layers.0", "layers.1"]
    with attach(model, **_given(model, "away", tmp_path)) as runtime, torch.no_grad():
        assert inspect.signature(model.layers[0].forward) == signature
        model(X)
        model(X)
        assert [block.calls for block in runtime.stats().blocks.values()] == [2, 2]


def test_an_encoder_that_fails_before_its_first_layer_gives_its_weights_back(
    tmp_path: Path,
) -> None:
    model = _make("encoder")
    with torch.no_grad():
        expected = model(X)
        with attach(model, **_given(model, "budget", tmp_path)):
            for _ in range(2):
                with pytest.raises(AssertionError):
                    model(X, src_key_padding_mask=torch.zeros(3, 8, dtype=torch.int64))
                assert torch.equal(model(X), expected)
