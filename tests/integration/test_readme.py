"""The README's commands exist, its Python compiles, and its links lead somewhere."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = sorted(
    path for path in (ROOT / "scripts").glob("*.py") if "ArgumentParser(" in path.read_text()
)


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
    elif command[0] == "python" and command[1] != "-c":
        script = command[2].replace(".", "/") + ".py" if command[1] == "-m" else command[1]
        text = (ROOT / script).read_text()
        for module in re.findall(r"^from (scripts\.[\w.]+) import", text, flags=re.MULTILINE):
            path = ROOT / (module.replace(".", "/") + ".py")  # flags that several scripts share
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


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_every_script_has_help(script: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(script), "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage:")
