"""What `make` runs, in which order, and how it ends."""

import json
import os
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lib.config import Config, load_config
from lib.errors import InputError
from lib.hints import BlockHint, Hints, ModelInfo, save_hints
from lib.tiering import load_specs
from lib.vocabulary import Tier
from scripts import doctor, kconfig, pipeline


def load(folder: Path, *lines: str) -> Config:
    path = folder / ".config"
    path.write_text(
        f'CONFIG_RUN_NAME="r"\nCONFIG_RUN_OUTPUT_DIR="{folder}"\n'
        + "".join(f"{x}\n" for x in lines)
    )
    return load_config(path)


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Replace the running of stages by noting them."""
    ran: list[list[str]] = []

    def note(command: list[str], *, temporary: str = "") -> tuple[str, Any]:
        ran.append([*command, temporary])
        return f"text {len(ran)}", {"complete": True, "step": 300, "number": len(ran)}

    monkeypatch.setattr(pipeline, "run_command", note)
    monkeypatch.setattr(
        "lib.report.benchmark_table", lambda results: f"table of {[r['number'] for r in results]}"
    )
    return ran


def name_of(command: list[str]) -> str:
    """Return the verb, or the last part of the module, that a command runs."""
    return command[1] if command[0] == "lib.commands" else command[0].rpartition(".")[2]


def make_trained(config: Config) -> None:
    (config.run.directory / "checkpoint").mkdir(parents=True)
    config.hints_path.touch()


def test_all_stages_run_and_the_table_of_both_modes_ends_the_output(
    tmp_path: Path, commands: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    make_trained(load(tmp_path, "CONFIG_TIERING_REAL_OFFLOAD=y"))
    assert pipeline.main(["--config", str(tmp_path / ".config")]) == 0
    assert [name_of(command) for command in commands] == [
        "train",
        "benchmark_tiered_inference",
        "benchmark_tiered_inference",
        "report",
    ]
    modes = [command[command.index("--mode") + 1] for command in commands[1:3]]
    assert modes == ["emulated", "real"]
    assert capsys.readouterr().out.endswith("\ntable of [2, 3]\n")


def test_exact_output_is_real(tmp_path: Path, commands: list[list[str]]) -> None:
    lines = ['CONFIG_BENCH_BUDGET="HBM=1MiB,SSD="', "CONFIG_BENCH_EXACT=y"]
    config = load(tmp_path, "CONFIG_TIERING_REAL_OFFLOAD=y", *lines)
    make_trained(config)
    pipeline.benchmark(config)
    assert ["--exact" in command for command in commands] == [False, True]


def test_only_what_the_configuration_asks_for_runs(tmp_path: Path) -> None:
    config = load(tmp_path, "# CONFIG_ENABLE_HIERARCHICAL_TIERING is not set")
    assert pipeline.configured_stages(config) == ["train", "report"]


def test_emulated_mode_is_given_the_speeds_of_the_configuration(
    tmp_path: Path, commands: list[list[str]]
) -> None:
    config = load(
        tmp_path,
        "CONFIG_TIERING_CPU_IS_CXL=y",
        "CONFIG_TIERING_SSD_SETUP_US=77",
        'CONFIG_TIERING_SPILL_DIR="spill"',
        "# CONFIG_BENCH_BOTH_MODES is not set",
    )
    make_trained(config)
    pipeline.benchmark(config)
    (command,) = commands
    spec = load_specs(command[command.index("--spec") + 1])
    numbers = {
        tier.value: (spec.specs[tier].name, spec.specs[tier].setup_us) for tier in spec.specs
    }
    assert numbers["CPU"] == ("CXL", 2.0)
    assert numbers["SSD"] == ("SSD", 77.0)
    assert command[-1] == "spill"


def test_budget_precision_and_epsilon_reach_the_benchmark_after_calibration(
    tmp_path: Path, commands: list[list[str]]
) -> None:
    config = load(
        tmp_path,
        'CONFIG_BENCH_BUDGET="HBM=1MiB,SSD="',
        "CONFIG_BENCH_PRECISION_INT4=y",
        'CONFIG_BENCH_EPSILON="ppl=1.02"',
    )
    (config.run.directory / "checkpoint").mkdir(parents=True)
    stale: dict[str, object] = {"calibrated": True, "conformal_factor": 1.3}
    full = {**stale, "conformal_probes": 60, "kernels": {"name": "cpu, bf16", "nats": 4e-5}}
    for quality, scripts in [
        ({}, ["calibrate", *["benchmark_tiered_inference"] * 2]),
        (stale, ["calibrate", *["benchmark_tiered_inference"] * 2]),
        (full, ["benchmark_tiered_inference"] * 2),
    ]:
        commands.clear()
        save_hints(tiny_hints(quality), config.hints_path)
        pipeline.benchmark(config)
        assert [name_of(command) for command in commands] == scripts
    for flag, value in [
        ("--budget", "HBM=1MiB,SSD="),
        ("--precision", "int4"),
        ("--epsilon", "ppl=1.02"),
    ]:
        assert commands[-1][commands[-1].index(flag) + 1] == value


def test_look_ahead_and_the_controllers_dwell_reach_the_benchmark(
    tmp_path: Path, commands: list[list[str]]
) -> None:
    for lines, dwell in [
        (("CONFIG_TIERING_LOOK_AHEAD=n", "CONFIG_TIERING_CONTROLLER=y"), "2000"),
        (("CONFIG_TIERING_CONTROLLER=y", "CONFIG_TIERING_DWELL_MS=70"), "70"),
        ((), None),
    ]:
        config = load(tmp_path, 'CONFIG_BENCH_BUDGET="HBM=1MiB,SSD="', *lines)
        (config.run.directory / "checkpoint").mkdir(parents=True, exist_ok=True)
        save_hints(tiny_hints({}), config.hints_path)
        commands.clear()
        pipeline.benchmark(config)
        command = commands[-1]
        assert ("--no-look-ahead" in command) is ("CONFIG_TIERING_LOOK_AHEAD=n" in lines)
        assert ("--dwell-ms" in command) is (dwell is not None)
        if dwell is not None:
            assert command[command.index("--dwell-ms") + 1] == dwell


@pytest.mark.parametrize(
    ("preset", "scripts"),
    [
        ("gpt2-allocation", ["calibrate", "compare_allocations"]),
        ("gpt2-kv-cache", ["compare_kv_cache", "rank-layers"]),
    ],
)
def test_other_uses_of_the_signals_come_after_the_benchmark(
    tmp_path: Path, commands: list[list[str]], preset: str, scripts: list[str]
) -> None:
    path = tmp_path / ".config"
    kconfig.main(["--config", str(path), "defconfig", preset])
    config = load_config(path)
    config = replace(config, run=replace(config.run, output_dir=str(tmp_path)))
    (config.run.directory / "checkpoint").mkdir(parents=True)
    save_hints(tiny_hints({}), config.hints_path)
    pipeline.benchmark(config)
    ran = [name_of(command) for command in commands]
    assert ran == ["benchmark_tiered_inference"] * 2 + scripts
    for command in commands[2:]:
        assert command[command.index("--model") + 1] == str(config.run.directory / "checkpoint")


def tiny_hints(quality: dict[str, object]) -> Hints:
    info = ModelInfo(id="m", revision="", class_name="M", parameter_digest=f"sha256:{'0' * 64}")
    hint = BlockHint(tier=Tier.HBM, importance=1.0, rank=1, num_bytes=4, num_params=1)
    provenance = {"signal": "fisher_trace", "created": "2026-01-01T00:00:00+00:00"}
    return Hints(model=info, provenance=provenance, quality=quality, blocks={"b": hint})


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (['BENCH_EPSILON="1.02x"'], "1.02x"),
        (['BENCH_BUDGET="HBM"'], "not TIER=SIZE"),
        (['BENCH_BUDGET="HBM=20KiB,SSD="'], "the smallest that works is HBM="),
        (['BENCH_BUDGET="HBM=1GiB"', "BENCH_PRECISION_INT4=y"], "a place for the originals"),
        (
            ['BENCH_BUDGET="HBM=1700KiB,SSD="', "BENCH_EXACT=y"],
            "doesn't hold a draft",
        ),
    ],
)
def test_a_bad_bound_or_budget_is_refused_before_training(
    tmp_path: Path, commands: list[list[str]], lines: list[str], problem: str
) -> None:
    small = ["GPT2_LAYERS=2", "GPT2_WIDTH=64", "GPT2_HEADS=2", "TIERING_REAL_OFFLOAD=y"]
    load(tmp_path, *(f"CONFIG_{line}" for line in [*small, *lines]))
    with pytest.raises(InputError, match=f"BENCH_BUDGET or BENCH_EPSILON: .*{problem}"):
        pipeline.main(["--config", str(tmp_path / ".config")])
    assert not commands


def test_a_benchmark_without_hints_or_model_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run make train"):
        pipeline.benchmark(load(tmp_path))
    with pytest.raises(InputError, match="no hints to benchmark"):
        pipeline.benchmark(load(tmp_path, "# CONFIG_TIERING_GENERATE_JSON is not set"))
    with pytest.raises(
        InputError, match="stage 'bnech' is unknown: choose from train, bench, report"
    ):
        pipeline.main(["bnech"])


@pytest.mark.parametrize(("kind", "message"), [("ext4", "can't be written"), ("tmpfs", "is on")])
def test_a_bad_spill_folder_is_refused_before_training(
    tmp_path: Path,
    commands: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    message: str,
) -> None:
    spill = tmp_path / "spill"
    if kind == "ext4":
        spill.touch()
    monkeypatch.setattr("lib.tiering.stores.filesystem_type", lambda _: kind)
    load(tmp_path, f'CONFIG_TIERING_SPILL_DIR="{spill}"')
    with pytest.raises(InputError, match=f"TIERING_SPILL_DIR '{spill}' {message}"):
        pipeline.main(["--config", str(tmp_path / ".config")])
    assert not commands


def test_interrupted_training_stops_the_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load(tmp_path)
    monkeypatch.setattr(pipeline, "run_command", lambda _: ("", {"complete": False, "step": 7}))
    assert pipeline.main(["--config", str(tmp_path / ".config")]) == 1
    assert "interrupted at step 7 of 300" in capsys.readouterr().err


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a file that ``run_command(["stage"])`` runs."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path / "stage.py"


def test_a_stage_gives_its_table_and_its_document(stage: Path, tmp_path: Path) -> None:
    stage.write_text(
        "import json, tempfile\nprint('a\\nb\\n')\nprint(json.dumps(tempfile.gettempdir()))"
    )
    folder = tmp_path / "spill"
    assert pipeline.run_command(["stage"], temporary=str(folder)) == ("a\nb", str(folder))


@pytest.mark.parametrize(("code", "expected"), [("exit(2)", 2), ("import os; os.abort()", 1)])
def test_a_failed_stage_ends_the_pipeline_with_its_code(
    stage: Path, code: str, expected: int
) -> None:
    stage.write_text(code)
    with pytest.raises(pipeline.StageFailed) as caught:
        pipeline.run_command(["stage"])
    assert caught.value.code == expected


def test_sigterm_is_passed_on_to_the_stage(stage: Path, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    stage.write_text(
        "import signal, time, pathlib\n"
        "def stop(*_):\n    print('\"saved\"')\n    raise SystemExit\n"
        f"signal.signal(signal.SIGTERM, stop)\npathlib.Path({str(ready)!r}).touch()\ntime.sleep(30)"
    )

    def terminate() -> None:
        while not ready.exists():
            threading.Event().wait(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=terminate).start()
    assert pipeline.run_command(["stage"]) == ("", "saved")
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_doctor_describes_this_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, output = tmp_path / ".config", tmp_path / "doctor.json"
    config.write_text("CONFIG_NOPE=y\n")
    assert doctor.main(["--config", str(config), "--json", str(output)]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document == json.loads(output.read_text())
    assert document["python"]["executable"] == sys.executable
    assert document["cpu"]["cores"] >= 1
    assert document["memory"]["total_bytes"] > document["memory"]["available_bytes"] > 0
    assert document["configuration"]["state"] == "invalid"
    assert "unknown symbol" in document["configuration"]["error"]
    assert document["next"] == "make menuconfig"
    assert document["machine_file"] == {"path": None, "name": None, "state": "off", "error": None}
