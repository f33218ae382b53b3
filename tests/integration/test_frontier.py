"""tierhints frontier on a tiny GPT-2 with measured curves, end to end."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_verify_epsilon import save_model

from lib.codecs.kernels import kernel_name
from lib.commands import frontier
from lib.commands.cli import run_main
from lib.evaluation.frontier import EPSILONS, UNIFORM
from lib.files import write_json
from lib.report.frontier import frontier_rows, frontier_table
from lib.report.run import load_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model(tmp_path_factory.mktemp("model"))
    hints = json.loads((folder / "tier_hints.json").read_text())
    hints["quality"]["kernels"]["name"] = kernel_name("cpu", torch.float32)
    write_json(hints, folder / "tier_hints.json")
    lines = [f"line {index}: {index**3 % 1009} jumps over {index**2}\n" for index in range(400)]
    (folder / "text.txt").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def document(folder: Path) -> dict[str, Any]:
    flags = ["--model", str(folder), "--tier-hints", str(folder / "tier_hints.json")]
    flags += ["--data", str(folder / "text.txt"), "--samples", "8", "--budgets", "250KiB,1KiB"]
    flags += ["--plot", str(folder / "frontier.png"), "--json", str(folder / "frontier.json")]
    assert run_main(lambda: frontier.main(flags)) == 0
    found: dict[str, Any] = json.loads((folder / "frontier.json").read_text())
    return found


def test_every_way_to_hold_the_weights_is_a_point(document: dict[str, Any]) -> None:
    full, points = document["full"], document["points"]
    resident = [point for point in points if point["budget_bytes"] is None]
    assert [point["holding"] for point in resident] == [
        *map(str, UNIFORM),
        *(f"epsilon {epsilon:g}" for epsilon in EPSILONS),
    ]
    assert all(point["fast_bytes"] < full["fast_bytes"] for point in points)
    assert all(point["tokens_per_s"] > 0 for point in (full, *points))
    kl = [point["kl_nats"] for point in resident]
    assert kl[0] < kl[len(UNIFORM) - 1]  # 8 bits cost less than 3
    for point in resident[len(UNIFORM) :]:
        assert point["kl_nats"] <= point["bound_nats"] <= point["epsilon"]


def test_streamed_points_stay_within_their_budget_and_lossless_ones_change_nothing(
    document: dict[str, Any],
) -> None:
    streamed = [point for point in document["points"] if point["budget_bytes"] is not None]
    assert {point["holding"] for point in streamed} >= {"lossless", "int8"}
    for point in streamed:
        assert point["fast_bytes"] <= point["budget_bytes"]
        assert (point["kl_nats"] == 0) == (point["holding"] == "lossless")
    assert {refused["budget_bytes"] for refused in document["refused"]} == {1024}
    assert all("smallest" in refused["reason"] for refused in document["refused"])


def test_the_table_and_the_picture_show_every_point(folder: Path, document: dict[str, Any]) -> None:
    assert len(frontier_rows(document)) == 1 + len(document["points"])
    table = frontier_table(document)
    assert "the full model" in table and "int4" in table and "epsilon 0.02" in table
    assert (folder / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_has_the_frontier_of_its_run(tmp_path: Path, document: dict[str, Any]) -> None:
    write_json(document, tmp_path / "frontier.json")
    write_json({"tiering": {"generate_json": False}}, tmp_path / "config.json")
    assert load_run(tmp_path).frontier == document
    write_json({"full": {}}, tmp_path / "frontier.json")
    broken = load_run(tmp_path)
    assert not broken.frontier
    assert any(missing.part == "frontier" for missing in broken.missing)
