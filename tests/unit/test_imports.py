"""The direction of imports between rooms, as docs/architecture.md tells it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = [
    {"alias", "errors"},
    {"extras", "vocabulary", "units", "files", "registry"},
    {"kconfig", "progress"},
    {"config", "blocks"},
    {"hints", "machine"},
    {"codecs"},
    {"checkpoint"},
    {"signals"},
    {"text"},
    {"precision"},
    {"policy"},
    {"tiering"},
    {"progressive"},
    {"evaluation"},
    {"serving"},
    {"exports", "report"},
    {"commands"},
    {"gpt2"},
    {"scripts"},
    {"experiments"},
]
"""The rooms from the ground up: a file imports its own room and those before it."""
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
FILES = sorted(path for room in ("lib", "gpt2", "scripts") for path in (ROOT / room).rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    """Return the dotted names that a file imports, relative ones resolved."""
    package = list(path.relative_to(ROOT).parent.parts)
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def room_of(parts: list[str]) -> str | None:
    """Return the room of a dotted name's or a path's parts; None: not ours, or lib itself."""
    if parts[0] == "lib":
        return parts[1] if parts[1:] and parts[1] in RANK else None
    if parts[:2] == ["scripts", "experiments"]:
        return "experiments"
    return parts[0] if parts[0] in {"gpt2", "scripts", "tests"} else None


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downwards(path: Path) -> None:
    own = room_of(list(path.relative_to(ROOT).with_suffix("").parts))
    for name in imported_modules(path):
        room = room_of(name.split("."))
        assert room != "tests", f"{path} imports {name}"
        if own is not None and room is not None and room != own:
            assert RANK[room] < RANK[own], f"{path}: {own} may not import {room}"


def test_every_room_has_its_place() -> None:
    names = {path.relative_to(ROOT / "lib").parts[0] for path in (ROOT / "lib").rglob("*.py")}
    assert {name.removesuffix(".py") for name in names} - {"__init__"} <= set(RANK)


def test_files_are_short_and_rooms_are_small() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in (ROOT / "lib").rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > 350
    }
    assert not long
    top = [path for path in (ROOT / "lib" / "tiering").iterdir() if path.suffix == ".py"]
    assert len(top) <= 9
    scripts = [path for path in (ROOT / "scripts").iterdir() if path.is_file()]
    assert len(scripts) <= 8


def test_the_library_imports_without_heavy_packages() -> None:
    heavy = ["transformers", "matplotlib", "datasets"]
    code = (
        "import sys, lib.tiering, lib.signals, lib.report;"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "[]"
