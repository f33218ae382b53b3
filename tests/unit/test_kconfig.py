"""Presets, the lint of Kconfig files, and what make says and does."""

import contextlib
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lib.commands.cli import run_main
from lib.config import build_config, load_config
from lib.errors import InputError
from lib.kconfig import ROOT, open_kconfig
from scripts import kconfig

PRESETS = sorted(path.name for path in kconfig.DEFCONFIGS.iterdir())
FRAGMENTS = [name for name in PRESETS if name.startswith("tier-")]
BASES = [name for name in PRESETS if name not in FRAGMENTS]

DEMANDED = """
ENABLE_HIERARCHICAL_TIERING TIERING_ADAM_STATE TIERING_FIM_TRACE TIERING_FIM_DIAG TIERING_EMULATED
TIERING_REAL_OFFLOAD TIERING_GENERATE_JSON TIERING_JSON_OUTPUT TIERING_HBM_THRESHOLD
TIERING_CPU_THRESHOLD TIERING_INFERENCE_BENCHMARK
""".split()


def test_the_public_symbols_exist() -> None:
    assert set(DEMANDED) <= set(open_kconfig().syms)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_loads(name: str, tmp_path: Path) -> None:
    kconfig.write_defconfig(name, tmp_path / ".config")
    load_config(tmp_path / ".config")


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("fragment", FRAGMENTS)
def test_every_fragment_takes_effect_on_every_base(base: str, fragment: str) -> None:
    symbols = kconfig.merge_defconfigs(
        open_kconfig(), [kconfig.DEFCONFIGS / base, kconfig.DEFCONFIGS / fragment]
    )
    tiering = build_config(symbols).tiering
    assert tiering.enabled
    assert tiering.mode == ("emulated" if "emulated" in fragment else "real")


def test_the_later_fragment_wins() -> None:
    paths = [kconfig.DEFCONFIGS / name for name in ("gpt2-smoke", "tier-8g", "tier-emulated")]
    tiering = build_config(kconfig.merge_defconfigs(open_kconfig(), paths)).tiering
    assert tiering.mode == "emulated"
    assert tiering.hbm_threshold == 0.4


def test_a_line_that_a_later_fragment_hides_is_an_error(tmp_path: Path) -> None:
    off = tmp_path / "off"
    off.write_text("# CONFIG_ENABLE_HIERARCHICAL_TIERING is not set\n")
    with pytest.raises(InputError, match="tier-8g:.*has no effect: it needs ENABLE_HIERARCHICAL"):
        kconfig.merge_defconfigs(open_kconfig(), [kconfig.DEFCONFIGS / "tier-8g", off])


def test_an_unknown_preset_names_a_close_one() -> None:
    with pytest.raises(InputError, match="did you mean gpt2-smoke"):
        kconfig.find_defconfig("gpt2-smok")
    with pytest.raises(InputError, match="no preset '../Kconfig'"):
        kconfig.find_defconfig("../Kconfig")


def test_a_wrong_configuration_ends_with_code_2_and_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / ".config"
    path.write_text("CONFIG_NOPE=y\n")
    arguments = ["--config", str(path), "savedefconfig", "--output", str(tmp_path / "defconfig")]
    assert run_main(lambda: kconfig.main(arguments)) == 2
    assert re.fullmatch(r"error: .*:1: CONFIG_NOPE=y: unknown symbol.*\n", capsys.readouterr().err)


def test_savedefconfig_gives_the_preset_back(tmp_path: Path) -> None:
    kconfig.write_defconfig("gpt2-smoke", tmp_path / ".config")
    kconfig.save_minimal(tmp_path / ".config", tmp_path / "defconfig")
    own = (kconfig.DEFCONFIGS / "gpt2-smoke").read_text()
    saved = (tmp_path / "defconfig").read_text()
    assert re.findall(r".*CONFIG_.*", saved) == re.findall(r".*CONFIG_.*", own)


def test_olddefconfig_drops_what_is_no_more_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / ".config"
    path.write_text(
        "CONFIG_NOPE=y\nCONFIG_TRAIN_STEPS=123\nCONFIG_GPT2_LAYERS=100000\n"
        "# CONFIG_ENABLE_HIERARCHICAL_TIERING is not set\nCONFIG_TIERING_REAL_OFFLOAD=y\n"
    )
    kconfig.update_config(path)
    config = load_config(path)
    assert config.train.steps == 123
    assert not config.tiering.enabled
    errors = capsys.readouterr().err
    for name in ("NOPE", "GPT2_LAYERS", "TIERING_REAL_OFFLOAD"):
        assert re.search(rf"^dropped: .*{name}", errors, re.M)
    assert "TRAIN_STEPS" not in errors


@pytest.mark.parametrize(
    "setting",
    [
        {"LC_ALL": "xx_YY.UTF-8"},
        {"LANG": "xx_YY.UTF-8"},
        {"LC_CTYPE": "UTF-8", "LC_COLLATE": "UTF-8"},
        {"LC_TIME": "xx_YY", "LANG": "C.UTF-8"},
        {"LC_ALL": "de_XX@euro", "LC_NUMERIC": "nonsense"},
        {"LC_ALL": "C.UTF-8"},
        {},
    ],
    ids=str,
)
def test_menuconfig_opens_under_any_locale(tmp_path: Path, setting: dict[str, str]) -> None:
    environment = {
        name: value
        for name, value in os.environ.items()
        if name != "LANG" and not name.startswith("LC_")
    }
    environment |= {"TERM": "xterm", "PYTHONPATH": str(ROOT)} | setting
    command = [sys.executable, "-m", "scripts.kconfig", "--config", str(tmp_path / "config")]
    terminal, inside = pty.openpty()
    process = subprocess.Popen(
        [*command, "menuconfig"],
        cwd=ROOT,
        env=environment,
        stdin=inside,
        stdout=inside,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(inside)
    os.write(terminal, b"qn")  # quit, save nothing
    shown = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while data := os.read(terminal, 65536):
            shown += data
    os.close(terminal)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert b"Tierhints" in shown or b"[Space/Enter]" in shown
    sound = set(setting.values()) <= {"C.UTF-8"}
    assert errors.count("\n") == (0 if sound else 1)
    named = {name: value for name, value in setting.items() if name != "LC_CTYPE"}
    # Python itself mends LC_CTYPE as it starts.
    assert sound or ("isn't installed, C" in errors and all(v in errors for v in named.values()))


def test_menuconfig_without_a_terminal_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", open(os.devnull))
    with pytest.raises(InputError, match="needs a terminal"):
        kconfig.edit_config(tmp_path / ".config")


def test_the_lint_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert kconfig.lint() == 0, capsys.readouterr().out


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a copy of what make and the Kconfig commands need, with a .venv that runs this one."""
    for name in ("Makefile", "Kconfig", "constraints.txt", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("defconfigs", "lib", "scripts", "gpt2"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    binary = tmp_path / ".venv" / "bin"
    binary.mkdir(parents=True)
    (binary / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (binary / "python").chmod(0o755)
    (tmp_path / ".venv" / ".stamp").touch()
    return tmp_path


def run_make(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    clean = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "KCONFIG_CONFIG", "V", "PYTHON"}
    environment = {name: value for name, value in os.environ.items() if name not in clean}
    return subprocess.run(
        ["make", *arguments], cwd=checkout, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("file", "before", "after", "finding"),
    [
        (
            "scripts/Kconfig",
            "endmenu",
            'config BENCH_NEW\n\tbool "New"\n\thelp\n\t  Text.\n\nendmenu',
            r"scripts/Kconfig:\d+: BENCH_NEW is read by nothing",
        ),
        (
            "lib/report/Kconfig",
            "endmenu",
            'config REPORT_NEW\n\tbool "New"\n\nendmenu',
            "REPORT_NEW has no help",
        ),
        ("lib/report/Kconfig", "endmenu", "endmeni", r"Kconfig:\d+: error: couldn't parse"),
        ("lib/report/Kconfig", "\trange 50 400\n", "", "REPORT_DPI is an int without a range"),
        ("lib/report/Kconfig", "\tbool", "    bool", r"Kconfig:\d+: indent with one tab"),
        ("defconfigs/gpt2-smoke", "=150", "=300", "gpt2-smoke: not as make savedefconfig"),
        ("defconfigs/gpt2-smoke", "TRAIN_STEPS", "TRAIN_STAPS", "unknown symbol"),
        ("defconfigs/tier-offload", "# Fragment", "CONFIG", "tier-offload: the first line must be"),
    ],
)
def test_the_lint_finds(checkout: Path, file: str, before: str, after: str, finding: str) -> None:
    text = (checkout / file).read_text()
    assert before in text
    (checkout / file).write_text(text.replace(before, after, 1))
    done = subprocess.run(
        [sys.executable, "-m", "scripts.kconfig", "lint"],
        cwd=checkout,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert re.search(finding, done.stdout + done.stderr)


def test_make_without_a_configuration_shows_the_way_and_exits_1(checkout: Path) -> None:
    done = run_make(checkout)
    assert done.returncode == 1
    assert "make quickstart" in done.stdout
    assert "make menuconfig" in done.stdout
    for name in PRESETS:
        purpose = (kconfig.DEFCONFIGS / name).read_text().splitlines()[0].removeprefix("# ")
        assert re.search(rf"^  {name} +{re.escape(purpose)}$", done.stdout, re.M)
    assert done.stderr == ""


@pytest.mark.parametrize("target", ["gpt2-smoke_defconfig", "defconfig-gpt2-smoke"])
def test_make_loads_presets_under_both_names(checkout: Path, target: str) -> None:
    assert run_make(checkout, target).returncode == 0
    assert load_config(checkout / ".config").run.name == "smoke"


def test_make_merges_fragments_and_verifies_them(checkout: Path) -> None:
    done = run_make(checkout, "defconfig-gpt2-smoke+tier-offload+tier-emulated-cxl")
    assert done.returncode == 0
    config = load_config(checkout / ".config")
    assert config.tiering.mode == "emulated"
    assert ("CPU", "CXL", 2.0, 400.0) in config.tiering.specs
    done = run_make(checkout, "defconfig-gpt2-smoke+tier-ofload")
    assert done.returncode == 2
    assert "error: no preset 'tier-ofload'; did you mean tier-offload?" in done.stderr


def test_make_shows_its_commands_on_request(checkout: Path) -> None:
    command = ".venv/bin/python -m scripts.kconfig --config .config defconfig gpt2-smoke"
    assert command not in run_make(checkout, "gpt2-smoke_defconfig").stdout
    assert command in run_make(checkout, "gpt2-smoke_defconfig", "V=1").stdout


def test_make_help_lists_every_target(checkout: Path) -> None:
    text = run_make(checkout, "help").stdout
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z%_-]+):", makefile, re.M))
    for target in targets:
        assert f"  {target.replace('%', '<name>')} " in text
    phony = set(re.findall(r"^\.PHONY: (.*)$", makefile, re.M))
    assert phony == {target for target in targets if "%" not in target}


def test_make_needs_a_recent_python(checkout: Path) -> None:
    (checkout / ".venv" / ".stamp").unlink()
    done = run_make(checkout, "doctor", "PYTHON=no-such-python")
    assert done.returncode == 2
    assert "error: no no-such-python" in done.stderr
    old = checkout / "old-python"
    old.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "raise SystemExit(\'is older\')"\n')
    old.chmod(0o755)
    done = run_make(checkout, "doctor", f"PYTHON={old}")
    assert done.returncode == 2
    assert not (checkout / ".venv" / ".stamp").exists()


def test_every_pin_is_a_version_and_torch_names_no_build() -> None:
    pins = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    assert any(pin.startswith("torch==") for pin in pins)
