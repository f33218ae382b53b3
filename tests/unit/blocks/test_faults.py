"""A weight that no precision can hold, or that spoils every number, is named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_gpt2, tiny_llama, tiny_mixtral
from torch import nn

from lib.blocks import partition_model
from lib.blocks.faults import find_fault
from lib.errors import InputError
from lib.precision.perturb import perturb, weight_error
from lib.precision.quality import measure_perturbations
from lib.signals import attention_fim_trace, measure_fisher
from lib.signals.kv import collect_kv_fisher
from lib.tiering import attach
from lib.vocabulary import Precision

IDS = torch.randint(40, (2, 8), generator=torch.Generator().manual_seed(0))
NAN, INF = float("nan"), float("inf")
CASES: list[tuple[Callable[[], Any], str, tuple[int, ...], str]] = [
    (tiny_llama, "model.layers.1.mlp.up_proj.weight", (3, 2), "model.layers.1.mlp"),
    (tiny_llama, "model.layers.0.self_attn.q_proj.weight", (0, 5), "model.layers.0.self_attn"),
    (tiny_gpt2, "transformer.h.1.mlp.c_fc.weight", (2, 7), "transformer.h.1.mlp"),
    (tiny_gpt2, "transformer.wte.weight", (11, 1), "transformer.wte"),
    (
        tiny_mixtral,
        "model.layers.0.mlp.experts.down_proj",
        (2, 1, 3),
        "model.layers.0.mlp.experts.2",
    ),
]


def spoil(model: nn.Module, name: str, place: tuple[int, ...], value: float) -> None:
    with torch.no_grad():
        model.get_parameter(name)[place] = value


def expected(name: str, place: tuple[int, ...], block: str) -> str:
    return f"parameter '{name}' of block '{block}' holds a weight at {list(place)} that is NaN"


@pytest.mark.parametrize(("make", "name", "place", "block"), CASES)
@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e37])
@pytest.mark.parametrize("fast", [None, "100KiB"])
def test_attach_names_the_weight(
    make: Callable[[], Any],
    name: str,
    place: tuple[int, ...],
    block: str,
    value: float,
    fast: str | None,
    tmp_path: Path,
) -> None:
    model = make().eval()
    spoil(model, name, place, value)
    budget: dict[str, Any] = {"HBM": fast, "CPU": None, "SSD": None}
    with pytest.raises(InputError) as raised:
        attach(model, budget=budget, precision="int4", spill_dir=tmp_path)
    assert expected(name, place, block) in str(raised.value) and "int4" in str(raised.value)


@pytest.mark.parametrize(("make", "name", "place", "block"), CASES)
@pytest.mark.parametrize("value", [NAN, INF, 70_000.0])
def test_what_overflows_a_narrower_type_is_named(
    make: Callable[[], Any], name: str, place: tuple[int, ...], block: str, value: float
) -> None:
    model = make().eval()
    spoil(model, name, place, value)
    with pytest.raises(InputError) as raised:
        attach(model, budget={"HBM": None, "SSD": None}, precision="fp16")
    assert expected(name, place, block) in str(raised.value) and "fp16" in str(raised.value)


def test_rows_of_a_later_shard_keep_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib.tiering.payload.layout._PART_BYTES", 2**10)
    model = nn.ModuleDict({"embed": nn.Embedding(1000, 64)})
    model.forward = lambda ids: model["embed"](ids)  # type: ignore[assignment]
    spoil(model, "embed.weight", (777, 5), NAN)
    with pytest.raises(InputError, match=r"'embed.weight' of block 'embed' .* at \[777, 5\]"):
        attach(model, budget={"HBM": None, "SSD": None}, precision="int8")


@pytest.mark.parametrize(("make", "name", "place", "block"), CASES)
@pytest.mark.parametrize("value", [NAN, -INF])
def test_predictions_and_measurements_name_it(
    make: Callable[[], Any], name: str, place: tuple[int, ...], block: str, value: float
) -> None:
    model = make().eval()
    spoil(model, name, place, value)
    wanted = expected(name, place, block)
    with pytest.raises(InputError) as raised:
        weight_error(model, name, Precision.INT4)
    assert wanted in str(raised.value)
    with pytest.raises(InputError) as raised, perturb(model, {block: Precision.INT4}):
        pass
    assert wanted in str(raised.value)
    other = next(b.name for b in partition_model(model) if b.name.endswith("attn"))
    if other == block:
        return
    calls: list[Callable[[], object]] = [
        lambda: measure_fisher(model, [IDS]),
        lambda: measure_perturbations(model, [IDS], [{other: Precision.INT8}]),
        lambda: collect_kv_fisher(model, [IDS]),
    ]
    for call in calls:
        with pytest.raises(FloatingPointError) as failed:
            call()
        assert wanted in str(failed.value)


def test_attention_that_is_no_number_names_the_weight() -> None:
    model = tiny_llama().eval()
    spoil(model, "model.layers.0.self_attn.q_proj.weight", (0, 5), NAN)
    with pytest.raises(FloatingPointError, match="q_proj.weight' of block 'model.layers.0.self"):
        attention_fim_trace(model, [IDS])


def test_sound_weights_have_no_fault() -> None:
    model = tiny_llama()
    assert find_fault(model) is None
    with torch.no_grad():
        model.model.norm.weight[:2] = INF
    assert find_fault(model) == (
        "parameter 'model.norm.weight' of block 'model.norm' holds 2 weights, the first at [0] "
        "that is NaN or infinite"
    )
