"""What every command shares: output files of their own, numbers in range, one line for an error."""

import argparse
import sys
from pathlib import Path
from types import ModuleType

import pytest

from lib.commands import frontier, what_if
from lib.commands.cli import Parser, add_json_flag, check_outputs, output_file, printable, run_main
from lib.commands.flags import add_seed_flag, flag_name, whole_number
from lib.errors import InputError


@pytest.fixture
def parser() -> Parser:
    parser = Parser("Do a thing.")
    parser.add_argument("--output", type=output_file, default=Path("out.json"))
    parser.add_argument("--plot", type=output_file)
    parser.add_argument("--tier-hints", type=Path)
    parser.add_argument("--samples", type=whole_number(1), default=4)
    add_seed_flag(parser, of="all")
    add_json_flag(parser)
    return parser


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "one", "other"),
    [
        ("--json out.json", "--output", "--json"),
        ("--json ./x/../out.json", "--output", "--json"),
        ("--json a.png --plot a.png", "--plot", "--json"),
        ("--json link.json", "--output", "--json"),
        ("--json h.json --tier-hints h.json", "--json", "--tier-hints"),
        ("--output h.json --tier-hints h.json", "--output", "--tier-hints"),
    ],
)
def test_each_output_is_a_file_of_its_own(
    parser: Parser, folder: Path, words: str, one: str, other: str
) -> None:
    (folder / "x").mkdir()
    (folder / "link.json").symlink_to("out.json")
    with pytest.raises(InputError, match=f"{one} .* is the file of {other}, too: give another"):
        parser.parse_args(words.split())


@pytest.mark.parametrize(
    "words", ["", "--json -", "--json b.json --plot c.png --tier-hints h.json"]
)
def test_other_outputs_are_fine(parser: Parser, words: str) -> None:
    parser.parse_args(words.split())


def test_an_output_that_can_t_be_written_is_refused_at_once(parser: Parser, folder: Path) -> None:
    for flag in ("--output", "--plot", "--json"):
        with pytest.raises(InputError, match="is a folder: give a file name"):
            parser.parse_args([flag, str(folder)])
    with pytest.raises(InputError, match="is the file of --json, too"):
        check_outputs({"--output": Path("a"), "--json": Path("a")})


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("--samples 0", "--samples: 0 is out of range: give 1 or more"),
        ("--samples -3", "--samples: -3 is out of range"),
        ("--samples 1.5", "--samples: '1.5' is not a whole number: give 1 or more"),
        ("--seed -1", "--seed: -1 is out of range: give 0 to 9223372036854775807"),
        (f"--seed {2**63}", "--seed: 9223372036854775808 is out of range"),
        (f"--seed {'9' * 5000}", "is not a whole number"),
        ("--speed", "unrecognized arguments: --speed"),
    ],
)
def test_a_bad_flag_is_one_line_and_exit_code_2(
    parser: Parser, words: str, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(lambda: parser.parse_args(words.split()) and 0) == 2
    error = capsys.readouterr().err
    assert problem in error and error.startswith("error: ") and error.count("\n") == 1


def test_the_ends_of_a_range_are_in_it(parser: Parser) -> None:
    args = parser.parse_args(["--samples", "1", "--seed", str(2**63 - 1)])
    assert (args.samples, args.seed) == (1, 2**63 - 1)
    with pytest.raises(argparse.ArgumentTypeError, match="give 2 to 3"):
        whole_number(2, 3)("4")


def test_a_setting_has_its_flag() -> None:
    assert flag_name("max_new_tokens") == "--max-new-tokens"


def test_control_characters_don_t_reach_a_terminal() -> None:
    assert printable("\x1b[2J\x07a\rb\x9b31m\x7f") == "\ufffd[2J\ufffda\ufffdb\ufffd31m\ufffd"
    assert printable("naïve\tÜ\n日本 \xa0") == "naïve\tÜ\n日本 \xa0"


@pytest.mark.parametrize("verb", [what_if, frontier])
def test_a_plot_needs_matplotlib_before_the_work(
    verb: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lib.extras.importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs matplotlib: pip install 'tierhints\[report\]'"):
        verb.main(["--model", "nowhere", "--plot", "x.png"])


def test_a_closed_stdout_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    ran: list[int] = []
    assert run_main(lambda: ran.append(1)) == 1 and not ran
    assert capsys.readouterr().err.startswith("failed: stdout is closed")
