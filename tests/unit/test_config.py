"""The .config as dataclasses, and what is refused."""

import dataclasses
import math
from pathlib import Path

import pytest

from lib.config import Config, load_config
from lib.errors import InputError
from lib.tiering import DEFAULT_SPECS
from lib.units import parse_number, parse_thresholds
from lib.vocabulary import Tier
from scripts.serve import serve_words


def load(folder: Path, *lines: str) -> Config:
    path = folder / "test.config"
    path.write_text("".join(f"{line}\n" for line in lines))
    return load_config(path)


def test_an_empty_file_gives_the_defaults_of_kconfig(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert config.run.directory == Path("runs/default")
    assert config.hints_path == Path("runs/default/tier_hints.json")
    assert config.train.learning_rate == 0.001
    assert (config.tiering.hbm_threshold, config.tiering.cpu_threshold) == (0.3, 0.8)
    assert config.tiering.mode == "emulated"


def test_values_and_choices_arrive_with_their_types(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "CONFIG_RUN_DEVICE_CPU=y",
        "CONFIG_DATA_WIKITEXT_103=y",
        "CONFIG_GPT2_DROPOUT_PCT=10",
        'CONFIG_TRAIN_LEARNING_RATE="6e-4"',
        "CONFIG_TRAIN_COMPILE=y",
        "CONFIG_TRAIN_FSDP2=y",
        "CONFIG_TIERING_FIM_DIAG=y",
        "CONFIG_HINTS_FISHER_DATA_LABELS=y",
        "CONFIG_TIERING_REAL_OFFLOAD=y",
        "CONFIG_TIERING_CLOCK_WALL=y",
        "CONFIG_BENCH_FLOAT16=y",
        "# CONFIG_REPORT_HTML is not set",
    )
    assert config.run.device == "cpu"
    assert config.data.source == "wikitext-103"
    assert config.model.dropout == 0.1
    assert config.train.learning_rate == 6e-4
    assert config.train.compile is True
    assert config.train.parallel == "fsdp2"
    assert config.tiering.signal == "fim_diag"
    assert config.tiering.fisher_labels == "data"
    assert config.tiering.mode == "real"
    assert config.tiering.clock == "wall"
    assert config.bench.dtype == "float16"
    assert config.report.html is False


def test_what_is_served_is_the_run_unless_it_is_said(tmp_path: Path) -> None:
    serve = load(tmp_path).serve
    assert (serve.model, serve.port, serve.default_bound) == ("", 8000, "full")
    assert load(tmp_path, 'CONFIG_SERVE_MODEL="a"', "CONFIG_SERVE_PORT=0").serve.model == "a"
    replicated = load(tmp_path, 'CONFIG_SERVE_MODEL="a"', "CONFIG_SERVE_REPLICAS=2")
    assert serve_words(replicated)[-3:] == ["--ray", "--replicas", "2"]
    assert "--ray" not in serve_words(load(tmp_path, 'CONFIG_SERVE_MODEL="a"'))


def test_text_is_unescaped(tmp_path: Path) -> None:
    config = load(tmp_path, "CONFIG_DATA_FILES=y", r'CONFIG_DATA_FILES_GLOB="a \"b\" \\ c"')
    assert config.data.files == r'a "b" \ c'


def test_the_configuration_is_frozen(tmp_path: Path) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load(tmp_path).train.steps = 1  # type: ignore[misc]


def test_loading_does_not_depend_on_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("srctree", "/usr/src/linux")
    assert load(tmp_path, "CONFIG_TRAIN_STEPS=77").train.steps == 77


def test_without_tiering_its_flags_are_off(tmp_path: Path) -> None:
    config = load(tmp_path, "# CONFIG_ENABLE_HIERARCHICAL_TIERING is not set")
    assert not config.tiering.enabled
    assert not config.tiering.generate_json
    assert not config.tiering.inference_benchmark
    assert config.tiering.hbm_threshold == 0.3


def test_the_default_tier_speeds_are_those_of_the_library(tmp_path: Path) -> None:
    for numbers in load(tmp_path).tiering.specs:
        spec = DEFAULT_SPECS[Tier(numbers.tier)]
        assert (numbers.setup_us, numbers.bandwidth_gb_s) == (spec.setup_us, spec.bandwidth_gb_s)


def test_the_second_tier_can_be_charged_as_cxl(tmp_path: Path) -> None:
    specs = load(tmp_path, "CONFIG_TIERING_CPU_IS_CXL=y").tiering.specs
    assert [tuple(numbers) for numbers in specs if numbers.tier == "CPU"] == [
        ("CPU", "CXL", 2.0, 400.0)
    ]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["CONFIG_NOPE=y"], "test.config:1: CONFIG_NOPE=y: unknown symbol"),
        (["CONFIG_TRAIN_STEP=3"], "did you mean CONFIG_TRAIN_STEPS?"),
        (["", "CONFIG_TRAIN_STEPS = 300"], "test.config:2: malformed line"),
        (["TRAIN_STEPS=300"], "test.config:1: malformed line"),
        (["CONFIG_TRAIN_STEPS="], "test.config:1: malformed line"),
        (["CONFIG_TRAIN_STEPS=many"], "test.config:1: CONFIG_TRAIN_STEPS=many: the value must be"),
        (["CONFIG_TRAIN_STEPS=0"], "out of range, allowed are 1 to"),
        (["# CONFIG_TRAIN_STEPS is not set"], "the value must be a whole number"),
        (["CONFIG_TRAIN_COMPILE=yes"], "the value must be y or n"),
        (["CONFIG_RUN_NAME=smoke"], "the value must be text in double quotes"),
        (['CONFIG_RUN_NAME="a"b"'], "the value must be text in double quotes"),
        (["CONFIG_TRAIN_STEPS=99", "CONFIG_TRAIN_STEPS=99"], "already set at"),
        (
            ["CONFIG_TIERING_FIM_TRACE=y", "CONFIG_TIERING_ADAM_STATE=y"],
            "test.config:1: CONFIG_TIERING_FIM_TRACE=y has no effect: TIERING_ADAM_STATE is chosen",
        ),
        (["# CONFIG_TIERING_ADAM_STATE is not set"], "one of its choice must be y"),
        (["CONFIG_HINTS_FISHER_SEQUENCES=3"], "has no effect: it needs !TIERING_ADAM_STATE"),
        (
            ["# CONFIG_ENABLE_HIERARCHICAL_TIERING is not set", 'CONFIG_TIERING_SPILL_DIR="x"'],
            "test.config:2: CONFIG_TIERING_SPILL_DIR",
        ),
        (
            ['CONFIG_GPT2_PRETRAINED="gpt2"', "CONFIG_GPT2_LAYERS=12"],
            'it needs GPT2_PRETRAINED = ""',
        ),
        (['CONFIG_TIERING_HBM_THRESHOLD="abc"'], "'abc' is not a plain decimal number"),
        (['CONFIG_TIERING_HBM_THRESHOLD="1.5"'], "'1.5' is out of range: give a number in [0, 1]"),
        (['CONFIG_TIERING_HBM_THRESHOLD="nan"'], "'nan' is not a plain decimal number"),
        (
            ['CONFIG_TIERING_HBM_THRESHOLD="0.9"'],
            "test.config:1: CONFIG_TIERING_HBM_THRESHOLD 0.9 is above",
        ),
        (['CONFIG_TRAIN_LEARNING_RATE="0"'], "give a number in (0, 1]"),
        (['CONFIG_TRAIN_BETA2="1"'], "give a number in [0, 1)"),
        (['CONFIG_TRAIN_CLIP="1e400"'], "give a number in [0, inf)"),
        (['CONFIG_RUN_NAME="../elsewhere"'], "is not a folder name"),
        (['CONFIG_RUN_NAME=""'], "is not a folder name"),
        (["CONFIG_GPT2_HEADS=3"], "is not a multiple of GPT2_HEADS"),
        (["CONFIG_DATA_FILES=y"], "CONFIG_DATA_FILES_GLOB is empty"),
        (["CONFIG_TRAIN_WARMUP_STEPS=301"], "is more than TRAIN_STEPS"),
        (["CONFIG_BENCH_SEQ_LENGTH=129"], "at most GPT2_CONTEXT"),
        (['CONFIG_TIERING_JSON_OUTPUT=""'], "CONFIG_TIERING_JSON_OUTPUT is empty"),
    ],
)
def test_mistakes_are_errors_of_one_line(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        load(tmp_path, *lines)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_or_unreadable_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="make menuconfig"):
        load_config(tmp_path / "absent")
    with pytest.raises(InputError, match="can't be read"):
        load_config(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="can't be read"):
        load_config(tmp_path / "binary")


def test_thresholds_are_cumulative_fractions() -> None:
    assert parse_thresholds("0.3", "0.8") == (0.3, 0.8)
    assert parse_thresholds(0.5, 0.7) == (0.5, 0.7)
    assert parse_thresholds("0", ".0") == (0.0, 0.0)
    assert parse_thresholds(1, 1) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("hbm", "cpu", "message"),
    [
        ("abc", "0.8", r"HBM threshold 'abc'.*\[0, 1\]"),
        ("0.3", "1.5", r"CPU threshold '1.5'.*\[0, 1\]"),
        (-0.1, 0.8, r"HBM threshold -0.1.*\[0, 1\]"),
        (math.nan, 0.8, r"HBM threshold nan.*\[0, 1\]"),
        ("0.9", "0.8", "HBM threshold 0.9 is above CPU threshold 0.8"),
    ],
)
def test_wrong_thresholds_name_value_range_and_fix(
    hbm: str | float, cpu: str | float, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        parse_thresholds(hbm, cpu)


@pytest.mark.parametrize(
    "text", ["", " 1", "1 ", "1_0", "0x1", "inf", "NaN", "1,5", "+1", "1.", "."]
)
def test_only_plain_decimals_are_numbers(text: str) -> None:
    with pytest.raises(InputError, match="plain decimal"):
        parse_number(text, name="x", interval="[-10, 10]", example="1")


def test_intervals_can_leave_their_ends_out() -> None:
    assert parse_number("-1e0", name="x", interval="[-1, 1]", example="0") == -1
    for text, interval in [("-1", "(-1, 1]"), ("1", "[-1, 1)")]:
        with pytest.raises(InputError, match="out of range"):
            parse_number(text, name="x", interval=interval, example="0")
