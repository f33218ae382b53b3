"""The direction of imports inside lib/, as docs/architecture.md tells it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = [
    {"errors"},
    {"files", "units"},
    {"kconfig"},
    {"config", "blocks"},
    {"hints", "faults"},
    {"machine"},
    {"checkpoint"},
    {"signals"},
    {"text"},
    {"precision"},
    {"policy"},
    {"tiering"},
    {"progressive"},
    {"export"},
    {"report"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


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
            names |= {module} if node.module else {f"{module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", sorted((ROOT / "lib").rglob("*.py")), ids=lambda path: path.stem)
def test_lib_imports_go_downwards(path: Path) -> None:
    own = path.relative_to(ROOT / "lib").parts[0].removesuffix(".py")
    for name in imported_modules(path):
        top, _, rest = name.partition(".")
        assert top not in {"gpt2", "scripts", "tests"}, f"{path} imports {name}"
        part = rest.split(".")[0]
        if top == "lib" and part and own != "__init__" and part != own:
            assert RANK[part] < RANK[own], f"{path}: {own} may not import {part}"


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
