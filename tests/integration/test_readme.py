"""The commands of README and docs exist, their Python compiles, links lead somewhere, and lines are
short.
"""

import ast
import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lib.commands.__main__ import VERBS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LONGEST_LINE = 140
OF_THE_CHECKOUT = ("extending.md",)
"""Pages whose examples may import from lib."""
PROGRAMS = [
    *(
        [str(path.relative_to(ROOT))]
        for path in sorted((ROOT / "scripts").rglob("*.py"))
        if "Parser(" in path.read_text() and "__main__" in path.read_text()
    ),
    *(["-m", "lib.commands", verb] for verb in VERBS),
    ["-m", "lib.commands"],
]


def code_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


def shell_commands() -> list[list[str]]:
    commands = []
    for page in PAGES:
        for block in code_blocks(page, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    commands.append(words)
    return commands


@pytest.mark.parametrize("command", shell_commands(), ids=" ".join)
def test_documented_commands_exist(command: list[str]) -> None:
    if command[0] == "make":
        goals = [word for word in command[1:] if "=" not in word]
        makefile = (ROOT / "Makefile").read_text()
        for goal in goals:
            known = re.search(rf"^{re.escape(goal)}:", makefile, flags=re.MULTILINE)
            preset = re.fullmatch(r"defconfig-(.+)|(.+)_defconfig", goal)
            presets = (preset[1] or preset[2]).split("+") if preset else []
            assert known or presets, f"no target {goal}"
            assert all((ROOT / "defconfigs" / name).exists() for name in presets)
    elif "tierhints" in command[0] or command[0] == "python" and command[1] != "-c":
        if command[0] == "python":
            script = command[2].replace(".", "/") + ".py" if command[1] == "-m" else command[1]
        else:
            assert command[1] in VERBS
            script = f"lib/commands/{command[1].replace('-', '_')}.py"
        text = (ROOT / script).read_text()
        shared = r"^ *from (lib\.commands|scripts|)\.([\w.]+) import"  # flags of several programs
        for package, module in re.findall(shared, text, flags=re.MULTILINE):
            folder = ROOT / package.replace(".", "/") if package else (ROOT / script).parent
            path = folder / (module.replace(".", "/") + ".py")
            text += path.read_text() if path.exists() else ""
        for word in command:
            if word.startswith("--"):
                assert f'"{word}"' in text, f"{script} has no {word}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documented_python_compiles(page: Path) -> None:
    for block in code_blocks(page, "python"):
        ast.parse(block)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documented_imports_are_there(page: Path) -> None:
    for block in code_blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if not isinstance(node, ast.ImportFrom) or node.module is None:
                continue
            package = node.module.partition(".")[0]
            if package in ("lib", "tierhints"):
                assert package == "tierhints" or page.name in OF_THE_CHECKOUT
                found = importlib.import_module(node.module)
                assert all(hasattr(found, name.name) for name in node.names), node.module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_are_short(page: Path) -> None:
    lines = enumerate(page.read_text().splitlines(), start=1)
    assert not [number for number, line in lines if len(line) > LONGEST_LINE]


def test_every_verb_is_on_the_page_of_commands() -> None:
    page = (ROOT / "docs" / "commands.md").read_text()
    shown = re.findall(r"^\*\*([\w-]+)\*\*: .+\n\n(?:```sh\n| {4})tierhints \1\b", page, re.M)
    assert set(VERBS) <= set(shown) and len(shown) == len(set(shown))


HELP_OF_EACH = """
import json, os, runpy, sys
import torch._dynamo, torch.distributed.fsdp, torch.onnx, transformers  # slow: once for all

root, folder, *programs = sys.argv[1:]
for number, words in enumerate(map(json.loads, programs)):
    if os.fork():
        _, status = os.wait()
        print(os.waitstatus_to_exitcode(status))
        continue
    for descriptor, name in (1, "out"), (2, "err"):
        os.dup2(os.open(f"{folder}/{number}.{name}", os.O_WRONLY | os.O_CREAT), descriptor)
    module = words[0] == "-m"
    sys.argv = [*words[module:], "--help"]
    sys.path[0] = root if module else os.path.dirname(os.path.join(root, words[0]))
    code = 0
    try:
        if module:
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    sys.stdout.flush()
    os._exit(code)  # to take down all that was imported would cost a second for each
"""


@pytest.fixture(scope="module")
def help_codes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """Run every program with --help; its output is in the folder."""
    folder = tmp_path_factory.mktemp("help")
    programs = map(json.dumps, PROGRAMS)
    command = [sys.executable, "-c", HELP_OF_EACH, str(ROOT), str(folder), *programs]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return folder, [int(code) for code in done.stdout.split()]


@pytest.mark.parametrize("number", range(len(PROGRAMS)), ids=[" ".join(p) for p in PROGRAMS])
def test_every_program_has_help(number: int, help_codes: tuple[Path, list[int]]) -> None:
    folder, codes = help_codes
    assert codes[number] == 0, (folder / f"{number}.err").read_text()
    assert (folder / f"{number}.out").read_text().startswith("usage:")
