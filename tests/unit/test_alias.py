"""In a checkout ``lib`` and ``tierhints`` are the same modules, however and whenever imported."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_python(code: str, *arguments: str, path: Path | None = None) -> str:
    """Run code in a checkout, where a second folder may hold another ``tierhints``."""
    folders = [str(ROOT), *([] if path is None else [str(path)])]
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path[:0] = {folders}\n{code}", *arguments],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


INSTALLED = f"""
import importlib.util
from importlib.machinery import PathFinder

class Installed:  # as an editable installation has it
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "tierhints":
            return importlib.util.spec_from_file_location(name, {str(ROOT / "lib/__init__.py")!r})

sys.meta_path.append(Installed)
"""


@pytest.mark.parametrize("first", ["lib", "tierhints"])
def test_both_names_are_the_same_modules_in_either_order(first: str) -> None:
    second = {"lib": "tierhints", "tierhints": "lib"}[first]
    code = f"""
import {first}
from {first}.policy import veto
import {second}.policy.veto
from {second}.policy.planner import knapsack
import {first}.policy.planner.knapsack as again, lib.hints.document, tierhints.hints.document
import lib, tierhints
assert lib is tierhints and lib.policy.veto is tierhints.policy.veto is veto
assert knapsack is again and lib.hints.document is tierhints.hints.document
ours = [name for name in sys.modules if name.partition(".")[0] == "lib"]
assert len(ours) > 5
for name in ours:
    module = sys.modules["tierhints" + name.removeprefix("lib")]
    assert module is sys.modules[name]
    assert module.__name__ == module.__spec__.name == "tierhints" + name.removeprefix("lib")
"""
    assert run_python(INSTALLED + code) == ""


def test_a_checkout_needs_no_installation() -> None:
    code = "import lib, lib.units, tierhints.units; assert lib.units is tierhints.units"
    assert run_python(code) == ""


def test_pickles_go_from_one_name_to_the_other() -> None:
    code = """
import pickle, lib.vocabulary
data = pickle.dumps([lib.vocabulary.Tier.SSD, lib.vocabulary.Precision], protocol=0)
assert b"tierhints.vocabulary" in data
import tierhints.vocabulary
expected = [tierhints.vocabulary.Tier.SSD, tierhints.vocabulary.Precision]
assert pickle.loads(data) == expected
assert pickle.loads(data.replace(b"tierhints.", b"lib.")) == expected
"""
    run_python(code)


def test_modules_reload_and_missing_ones_are_missing() -> None:
    code = """
import importlib, lib.units
assert importlib.reload(lib) is lib and importlib.reload(lib.units) is sys.modules["lib.units"]
try:
    import lib.nothing
except ModuleNotFoundError as error:
    print(error.name)
try:
    from lib import nothing
except ImportError:
    print("no attribute")
"""
    assert run_python(code).splitlines() == ["lib.nothing", "no attribute"]


def test_threads_import_under_both_names_at_once() -> None:
    code = """
import importlib, lib
from concurrent.futures import ThreadPoolExecutor
names = [f"{package}.{module}" for module in ("units", "vocabulary", "hints", "machine", "policy")
         for package in ("lib", "tierhints")]
with ThreadPoolExecutor(len(names)) as pool:
    found = list(pool.map(importlib.import_module, names))
assert all(one is two for one, two in zip(found[::2], found[1::2]))
"""
    run_python(code)


@pytest.mark.parametrize("name", ["lib", "tierhints"])
def test_the_commands_run_as_a_module(name: str) -> None:
    code = f"""
import lib, runpy
sys.argv = ["tierhints"]
runpy.run_module("{name}.commands", run_name="__main__", alter_sys=True)
"""
    assert run_python(code).startswith("usage: tierhints <verb>")


def test_a_checkout_beside_another_installation_says_which_is_used(tmp_path: Path) -> None:
    other = tmp_path / "tierhints"
    other.mkdir()
    (other / "__init__.py").write_text("")
    (other / "alias.py").write_text("")
    (other / "units.py").write_text("HERE = True")
    code = "import tierhints, lib, lib.units; assert lib is tierhints and lib.units.HERE"
    said = run_python(code, path=tmp_path)
    assert said.count("Warning") == 1
    assert str(other) in said and str(ROOT / "lib") in said
    ours = run_python("import lib, tierhints; print(tierhints.__file__)", path=tmp_path)
    assert ours.strip() == str(ROOT / "lib" / "__init__.py")
