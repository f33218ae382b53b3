"""The README's commands exist, its Python compiles, and its links lead somewhere."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lib.commands.__main__ import VERBS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = [
    *(
        [str(path.relative_to(ROOT))]
        for path in sorted((ROOT / "scripts").rglob("*.py"))
        if "ArgumentParser(" in path.read_text() and "__main__" in path.read_text()
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


@pytest.mark.parametrize("program", PROGRAMS, ids=" ".join)
def test_every_program_has_help(program: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *program, "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage:")
