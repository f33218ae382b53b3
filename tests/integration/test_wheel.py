"""The wheel, built from the tracked files and installed away from the checkout: what users get."""

import ast
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from lib.codecs.native import load_native
from lib.commands.__main__ import VERBS

ROOT = Path(__file__).parents[2]
HIDDEN = """
from importlib.machinery import PathFinder

found = PathFinder.find_spec
PathFinder.find_spec = staticmethod(
    lambda name, *rest: None if name.partition(".")[0] in {names} else found(name, *rest)
)
"""
TINY = """
import torch
from transformers import GPT2Config, GPT2LMHeadModel
torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=40, n_positions=32))
ids = torch.arange(16)[None]
"""


@dataclass(frozen=True)
class Installed:
    """A virtual environment with the wheel in it."""

    wheel: Path
    folder: Path

    def run(self, *words: str, cwd: Path | None = None) -> str:
        """Run a program of the environment outside the checkout; returns its output."""
        environment = {key: os.environ[key] for key in os.environ if key != "PYTHONPATH"}
        done = subprocess.run(
            [str(self.folder / "bin" / words[0]), *words[1:]],
            capture_output=True,
            text=True,
            cwd=cwd or self.folder,
            env=environment,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def python(self, code: str, *, without: set[str] | None = None, cwd: Path | None = None) -> str:
        """Run code, with some packages missing."""
        hidden = HIDDEN.format(names=without) if without else ""
        return self.run("python", "-c", hidden + code, cwd=cwd)


def install(folder: Path, **variables: str) -> Installed:
    """Build the wheel of a copy of the library, and install it."""
    source = folder / "source"
    caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "lib", source / "lib", ignore=caches)
    for name in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder)]
    subprocess.run([*pip, *build, str(source)], check=True, env={**os.environ, **variables})
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv", with_pip=False)
    scheme = {"base": str(folder / "venv"), "platbase": str(folder / "venv")}
    site = Path(sysconfig.get_path("purelib", "venv", scheme))
    # The running environment's packages, without what its own .pth files add, such as this checkout
    (site / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = str(folder / "venv" / "bin" / "python")
    install = ["install", "--no-deps", "--no-index", "--force-reinstall", str(wheel)]
    subprocess.run([*pip, "--python", python, *install], check=True)
    return Installed(wheel, folder / "venv")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return install(tmp_path_factory.mktemp("wheel"))


def test_it_holds_the_library_and_nothing_else(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as file:
        names = set(file.namelist())
    own = {str(Path(name).relative_to("tierhints")) for name in names if "dist-info" not in name}
    expected = {
        str(path.relative_to(ROOT / "lib"))
        for path in (ROOT / "lib").rglob("*")
        if path.suffix in (".py", ".json", ".typed", ".cpp", ".h", ".inl")
    }
    assert own == expected
    assert {"py.typed", "hints/tier_hints.schema.json"} <= own


@pytest.mark.skipif(load_native().library is None, reason="the extension isn't built here")
def test_a_wheel_brings_kernels_to_a_machine_without_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = install(tmp_path, TIERHINTS_BUILD_NATIVE="1")
    assert "-py3-none-" in installed.wheel.name and "none-any" not in installed.wheel.name
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    code = """
from tierhints.codecs import native, ops
print(native.load_native().library, ops.prepare("cpu"))
native.torch.__version__ = "another"  # the kernels aren't for it
print(native.obtain_native().reason)
"""
    said, other = installed.python(code).splitlines()
    path, kind = said.split()
    assert kind == "native" and Path(path).is_relative_to(installed.folder)
    assert "no C++ compiler" in other


def test_a_wheel_with_kernels_says_what_it_lacks(tmp_path: Path) -> None:
    def build(value: str, **variables: str) -> str:
        done = subprocess.run(
            [sys.executable, "setup.py", "--quiet", "build", "-b", str(tmp_path)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "TIERHINTS_BUILD_NATIVE": value, **variables},
        )
        assert done.returncode == 1
        return done.stderr

    assert "TIERHINTS_BUILD_NATIVE is 'yes': set 1" in build("yes")
    empty = {"XDG_CACHE_HOME": str(tmp_path), "PATH": str(tmp_path), "CXX": "none"}
    assert "no kernels: no C++ compiler" in build("1", **empty)


def test_it_is_used_and_not_the_checkout(installed: Installed) -> None:
    where = installed.python("import tierhints; print(tierhints.__file__)").strip()
    assert where == str(next(installed.folder.rglob("tierhints/__init__.py")))


def test_hints_and_machine_need_no_torch_and_no_extra(installed: Installed) -> None:
    hints = {"transformer.h.0.attn": "HBM", "transformer.h.0.mlp": "SSD"}
    path = installed.folder / "hints.json"
    path.write_text(json.dumps(hints))
    code = f"""
import tierhints, tierhints.hints, tierhints.machine
print(sorted(tierhints.load_hints({str(path)!r}).blocks))
from tierhints.hints.document import SCHEMA_PATH
assert SCHEMA_PATH.is_file()
"""
    without = {"torch", "transformers", "kconfiglib", "matplotlib", "datasets", "gguf"}
    assert installed.python(code, without=without).strip() == str(sorted(hints))


def test_models_are_attached_and_hints_made_without_any_extra(installed: Installed) -> None:
    code = f"""{TINY}
import tierhints
assert all(callable(getattr(tierhints, name)) for name in tierhints.__all__)
model.eval()
expected = model(ids).logits
hints = tierhints.collect_fisher(model, ids, model_id="tiny")
tierhints.save_hints(hints, "full_hints.json")
assert tierhints.load_hints("full_hints.json") == hints
with tierhints.attach(model, "full_hints.json", budget={{"HBM": "100KiB", "SSD": None}}) as runtime:
    assert torch.equal(model(ids).logits, expected)
    assert runtime.stats().bytes_moved > 0
print("same bits")
"""
    without = {"kconfiglib", "matplotlib", "datasets", "gguf", "torchao", "accelerate", "scipy"}
    assert "same bits" in installed.python(code, without=without)


def test_a_saved_model_answers(installed: Installed) -> None:
    code = f"""{TINY}
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
letters = {{chr(97 + index): index for index in range(26)}}
tokenizer = Tokenizer(models.WordLevel(letters, unk_token="a"))
tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained("tiny")
model.save_pretrained("tiny")
"""
    installed.python(code)
    words = ["--model", "tiny", "--budget", "HBM=100KiB,SSD=", "--max-new-tokens", "5"]
    said = installed.run("tierhints", "generate", *words, "--prompt", "hello")
    figures = json.loads(said.splitlines()[-1])
    assert figures["new_tokens"] == 5 and figures["bytes_per_token"] > 0


def test_what_the_library_imports_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [
        *project["dependencies"],
        *itertools.chain(*project["optional-dependencies"].values()),
    ]
    names = {re.match(r"[\w-]+", each)[0].replace("-", "_") for each in declared}  # type: ignore[index]
    names |= {"jinja2"}  # torch's
    names |= {"lm_eval"}  # for --tasks, which names it where it is missing
    always = {re.match(r"[\w-]+", each)[0] for each in project["dependencies"]}  # type: ignore[index]
    for path in (ROOT / "lib").rglob("*.py"):
        tree = ast.parse(path.read_text())
        found = {name for node in ast.walk(tree) for name in imported(node)}
        assert found <= names, path
        at_once = {name for node in tree.body for name in imported(node)}
        whole = path.parent.name == "serving" or path.name.startswith(("triton_", "monitor"))
        assert at_once <= always or whole, path


def imported(node: ast.AST) -> set[str]:
    """Name the packages that a statement imports, the standard library's left out."""
    if isinstance(node, ast.Import):
        modules = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and not node.level:
        modules = [node.module or ""]
    else:
        return set()
    return {module.partition(".")[0] for module in modules} - sys.stdlib_module_names


@pytest.mark.parametrize(
    ("package", "call"),
    [
        ("gguf", "exports.gguf_names import import_gguf as call"),
        ("kconfiglib", "kconfig import open_kconfig as call"),
        ("matplotlib", "report.drawing import need_matplotlib as call"),
        ("ray", "commands.serve import main; call = lambda: main(['--ray', '--model', 'm'])"),
        (
            "datasets",
            "text.hub import HUB_DATASETS, _resolve_revision; "
            "call = lambda: _resolve_revision(HUB_DATASETS['openwebtext'])",
        ),
    ],
)
def test_what_an_extra_brings_is_named_where_it_is_missing(
    installed: Installed, package: str, call: str
) -> None:
    code = f"""
import tierhints
from tierhints.{call}
try:
    call()
except tierhints.InputError as error:
    print(error)
"""
    said = installed.python(code, without={package})
    assert f"this needs {package}: pip install 'tierhints[" in said


def test_the_command_runs_both_ways(installed: Installed) -> None:
    usage = installed.run("tierhints", "--help")
    assert all(verb in usage for verb in VERBS)
    assert installed.run("python", "-m", "tierhints.commands", "--help") == usage


def test_pickles_of_a_checkout_load(installed: Installed) -> None:
    make = "import pickle, sys; from lib.units import InputError; from lib.vocabulary import Tier\n"
    make += "sys.stdout.write(pickle.dumps([Tier.SSD, InputError('x')], protocol=0).decode())"
    made = subprocess.run(
        [sys.executable, "-c", make], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout
    code = f"import pickle; print(pickle.loads({made.encode()!r}))"
    assert installed.python(code).strip() == "[<Tier.SSD: 'SSD'>, InputError('x')]"


def test_a_checkout_beside_it_uses_its_own_modules(installed: Installed) -> None:
    code = "import lib.units, tierhints.units; assert lib.units is tierhints.units; print(lib)"
    assert str(ROOT) in installed.python(code, cwd=ROOT)


@pytest.mark.slow
def test_programs_of_a_checkout_run_by_path_from_anywhere(installed: Installed) -> None:
    script = str(ROOT / "scripts" / "benchmark_tiered_inference.py")
    assert installed.run("python", script, "--help").startswith("usage:")
