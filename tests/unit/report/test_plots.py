"""The report's pictures: written whole, of the right data, and refused without data."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lib.errors import InputError
from lib.hints import BlockHint, Hints, load_hints
from lib.report.benchmark_plots import latency_shares, plot_latency, plot_memory, plot_stays
from lib.report.drawing import picture, split_layer
from lib.report.plots import (
    attention_traces,
    plot_attention,
    plot_importance,
    plot_loss,
    plot_tiers,
    tier_bytes,
)
from lib.vocabulary import Tier

PNG = b"\x89PNG\r\n\x1a\n"
FLAT = Hints(blocks={"wte": BlockHint(tier=Tier.HBM), "h.0.attn": BlockHint(tier=Tier.SSD)})


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(PNG) and not list(path.parent.glob(".*.partial"))


def test_loss(sample_run: Path, tmp_path: Path) -> None:
    plot_loss(sample_run / "metrics.jsonl", tmp_path / "loss.png", 6.2)
    assert is_picture(tmp_path / "loss.png")


def test_loss_of_a_run_that_never_evaluated(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"step": 1, "loss": 9.0}\n')
    plot_loss(tmp_path / "m.jsonl", tmp_path / "loss.png")
    assert is_picture(tmp_path / "loss.png")


def test_no_loss_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text(json.dumps({"step": 1, "lr": 0.1}) + "\n")
    with pytest.raises(InputError, match="no loss"):
        plot_loss(tmp_path / "m.jsonl", tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_hints(sample_run: Path, tmp_path: Path) -> None:
    hints = load_hints(sample_run / "tier_hints.json")
    for name, plot in (
        ("importance", plot_importance),
        ("tiers", plot_tiers),
        ("attention", plot_attention),
    ):
        plot(hints, tmp_path / f"{name}.png", dpi=50)
        assert is_picture(tmp_path / f"{name}.png")
    assert len(attention_traces(hints)) == 6


def test_model_without_layers_or_with_many_experts(tmp_path: Path) -> None:
    names = [
        f"model.layers.{layer}.mlp.experts.{index}" for layer in range(8) for index in range(40)
    ]
    for blocks in (["embed", "head"], names):
        hints = Hints(
            blocks={
                name: BlockHint(tier=Tier.CPU, importance=0.5, rank=1, num_bytes=8, num_params=2)
                for name in blocks
            }
        )
        plot_importance(hints, tmp_path / "importance.png", dpi=50)
        plot_tiers(hints, tmp_path / "tiers.png", dpi=50)
        assert is_picture(tmp_path / "importance.png")


@pytest.mark.parametrize("plot", [plot_importance, plot_tiers, plot_attention])
def test_flat_hints_are_refused(plot: Callable[[Hints, Path], None], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the hints hold no"):
        plot(FLAT, tmp_path / "x.png")


def test_tier_bytes_counts_each_byte_once(sample_run: Path) -> None:
    hints = load_hints(sample_run / "tier_hints.json")
    total = sum(hint.num_bytes or 0 for hint in hints.blocks.values())
    assert list(tier_bytes(hints)) == [Tier.HBM, Tier.CPU, Tier.SSD]
    assert sum(tier_bytes(hints).values()) == total
    assert tier_bytes(FLAT) == {}


@pytest.mark.parametrize("modes", [["real"], ["emulated", "real"]])
def test_benchmarks(
    make_benchmark: Callable[[str], dict[str, Any]], modes: list[str], tmp_path: Path
) -> None:
    documents = [make_benchmark(mode) for mode in modes]
    documents[0] |= {"baseline": None, "impact": None}
    plot_latency(documents, tmp_path / "latency.png", dpi=50)
    plot_memory(documents, tmp_path / "memory.png", dpi=50)
    plot_stays(documents, tmp_path / "stays.png", dpi=50)
    assert all(is_picture(tmp_path / f"{name}.png") for name in ("latency", "memory", "stays"))


def test_a_run_in_which_nothing_moves_has_no_stays(
    make_benchmark: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="no block came into a slot"):
        plot_stays([make_benchmark("emulated")], tmp_path / "x.png")


@pytest.mark.parametrize("plot", [plot_latency, plot_memory])
def test_no_benchmark_is_refused(plot: Callable[[list[Any], Path], None], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no benchmark was run"):
        plot([], tmp_path / "x.png")


def test_shares_of_latency_add_up_to_the_mean(
    make_benchmark: Callable[[str], dict[str, Any]],
) -> None:
    document = make_benchmark("emulated")
    shares = latency_shares(document)
    mean = document["tiered"]["latency_ms"]["mean"]
    assert sum(share.milliseconds for share in shares) == pytest.approx(mean)
    transfer = sum(share.milliseconds for share in shares if "transfer" in share.name)
    assert transfer == pytest.approx(document["tiered"]["transfer_ms_per_forward"])


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("transformer.h.3.attn", (3, "attn")),
        ("model.layers.0.mlp.experts.7", (0, "mlp.experts.7")),
        ("transformer.wte", (None, "wte")),
        ("layers.4", (4, "layers")),
    ],
)
def test_layer_of_a_block_name(name: str, place: tuple[int | None, str]) -> None:
    assert split_layer(name) == place


def test_a_failed_picture_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "old.png"
    path.write_bytes(PNG)
    with pytest.raises(RuntimeError), picture(path, (1, 1), 50):
        raise RuntimeError
    assert path.read_bytes() == PNG and list(tmp_path.iterdir()) == [path]
