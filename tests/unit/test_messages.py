"""What the library says names calls of the library or tierhints verbs: it is installed anywhere."""

import ast
import re
from pathlib import Path

import pytest

LIB = Path(__file__).parents[2] / "lib"
TARGETS = re.findall(r"^([a-z-]+):", (LIB.parent / "Makefile").read_text(), re.MULTILINE)
OF_A_CHECKOUT = {"kconfig.py", "config", "report"}
"""The configuration of a checkout, and the report of a run that was trained in one."""
FILES = sorted(
    path for path in LIB.rglob("*.py") if path.relative_to(LIB).parts[0] not in OF_A_CHECKOUT
)
NOT_INSTALLED = re.compile(rf"scripts[/.]|\bgpt2[/.]|\blib[/.]|\bmake ({'|'.join(TARGETS)})\b")


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
    assert not [text for text in strings(path) if NOT_INSTALLED.search(text)]


def test_the_check_finds_what_it_should() -> None:
    bad = ["run make probe", "python scripts/x.py", "lib.tiering.load(folder)", "lib/machine.py"]
    assert all(map(NOT_INSTALLED.search, bad))
    assert not NOT_INSTALLED.search("make room; libc.so.6; tierhints.load(folder)")
