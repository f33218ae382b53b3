"""What the library says names calls of the library or tierhints verbs: it is installed anywhere."""

import ast
import re
from pathlib import Path

import pytest

LIB = Path(__file__).parents[2] / "lib"
TARGETS = re.findall(r"^([a-z-]+):", (LIB.parent / "Makefile").read_text(), re.MULTILINE)
OF_A_CHECKOUT = {"kconfig.py", "config"}
"""The configuration of a checkout."""
TRAINING = "gpt2.train"
"""What the report may name: it is of a run that was trained in a checkout."""
FILES = sorted(
    path for path in LIB.rglob("*.py") if path.relative_to(LIB).parts[0] not in OF_A_CHECKOUT
)
NOT_INSTALLED = re.compile(rf"scripts[/.]|\bgpt2[/.]|\blib[/.]|\bmake ({'|'.join(TARGETS)})\b")

FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+")
OF_OTHER_PROGRAMS = {"--config", "--tensor-type-file", "--imatrix", "--override-tensor"}
"""Flags of gpt2.train, llama.cpp and vLLM, which commands that the library prints have."""


def strings(path: Path) -> list[str]:
    """Return a file's string constants but docstrings, parts of f-strings included."""
    tree = ast.parse(path.read_text())
    documentation = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in documentation
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(LIB)))
def test_messages_name_nothing_of_a_checkout(path: Path) -> None:
    allowed = TRAINING if path.parent.name == "report" else ""
    said = [text.replace(allowed, "") for text in strings(path)]
    assert not [text for text in said if NOT_INSTALLED.search(text)]


def test_flags_that_messages_name_are_those_of_a_verb() -> None:
    files = [path for path in FILES if path.name != "style.py"]  # CSS has variables like flags
    verbs = [path for path in files if path.parent.name == "commands"]
    known = {text for path in verbs for text in strings(path) if FLAG.fullmatch(text)}
    for path in set(files) - set(verbs):
        named = {flag for text in strings(path) for flag in FLAG.findall(text)}
        assert named <= known | OF_OTHER_PROGRAMS, (path, named - known)


def test_the_check_finds_what_it_should() -> None:
    bad = ["run make probe", "python scripts/x.py", "lib.tiering.load(folder)", "lib/machine.py"]
    assert all(map(NOT_INSTALLED.search, bad))
    assert not NOT_INSTALLED.search("make room; libc.so.6; tierhints.load(folder)")
