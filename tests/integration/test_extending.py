"""docs/extending.md: its examples run, from registration to use, and pass the suites."""

import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from test_collect_fisher import byte_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from lib.blocks import partition_model
from lib.codecs.kernels import KERNELS
from lib.commands import collect
from lib.errors import InputError
from lib.hints import load_hints, match_hints
from lib.signals.interface import SIGNALS
from lib.tiering import attach
from lib.tiering.stores import STORES
from lib.vocabulary import Tier
from scripts.experiments.offload.peers import SYSTEMS
from scripts.experiments.offload.settings import CPU_SETTING, CUDA_SETTING

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text()


def blocks(title: str, language: str = "python") -> list[str]:
    """Return the code blocks of a section."""
    section = PAGE.split(f"## {title}\n")[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", section, flags=re.DOTALL)


def run_blocks(title: str, **names: Any) -> dict[str, Any]:
    """Run a section's code and return its names; they are a module's, as they would be in one."""
    namespace = {"__name__": "example", **names}
    for block in blocks(title):
        exec(compile(block, "docs/extending.md", "exec", dont_inherit=True), namespace)
    return namespace


@pytest.fixture(autouse=True)
def _registries() -> Iterator[None]:
    with ExitStack() as stack:
        for registry in (STORES, KERNELS, SIGNALS, SYSTEMS):
            stack.enter_context(registry.restored())
        yield


def toy() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=32, n_positions=32, vocab_size=258, eos_token_id=257
    )
    return GPT2LMHeadModel(config).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(torch.arange(20)[None]).logits
    return output


def test_a_store_serves_its_tier_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUCKET", str(tmp_path))
    model = toy()
    expected = logits(model)
    names = run_blocks("A store", model=model)
    runtime = names["runtime"]
    assert runtime.plan.bytes_per_tier()[Tier.OBJECT] > 0
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.block")) > 0
    assert torch.equal(logits(model), expected)
    assert runtime.stats().bytes_moved > 0
    runtime.detach()
    assert torch.equal(logits(model), expected) and not list(tmp_path.rglob("*.block"))


def test_a_tier_without_figures_or_without_a_store_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = {"HBM": "96KiB", "OBJECT": None}
    with pytest.raises(InputError, match=r"real mode has no OBJECT tier; .*register a store"):
        attach(toy(), budget=budget)
    monkeypatch.setenv("BUCKET", str(tmp_path))
    run_blocks("A store", model=toy())["runtime"].detach()
    with pytest.raises(InputError, match="OBJECT, of which the machine profile has no figures"):
        attach(toy(), budget=budget)


def test_hints_may_place_blocks_in_the_tier_of_a_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUCKET", str(tmp_path))
    run_blocks("A store", model=toy())["runtime"].detach()
    model = toy()
    expected = logits(model)
    hints = {block.name: "HBM" for block in partition_model(model)} | {
        "transformer.h.1.mlp": "OBJECT"
    }
    with pytest.warns(UserWarning, match="flat hints"), attach(model, hints) as runtime:
        assert runtime.plan.placements["transformer.h.1.mlp"].tier is Tier.OBJECT
        assert torch.equal(logits(model), expected)


def test_a_kernel_is_planned_with_and_computes() -> None:
    model = toy()
    expected = logits(model)
    names = run_blocks("A kernel", model=model, attach=attach)
    kernel, runtime = names["Int8InFp32"], names["runtime"]
    held = [each for each in gc.get_objects() if type(each) is kernel]
    assert held, "no weight is held by it"
    assert 0 < (logits(model) - expected).abs().max() < 0.05
    runtime.detach()
    assert torch.equal(logits(model), expected)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    toy().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "book.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    return folder


def test_a_signal_becomes_hints_that_attach_takes(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_blocks("A signal")
    flags = blocks("A signal", "sh")[0].split()[2:]
    flags[flags.index("gpt2")] = str(checkpoint)
    flags[flags.index("book.txt")] = str(checkpoint / "book.txt")
    assert collect.main([*flags, "--samples", "2", "--output", str(tmp_path / "h.json")]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    model = GPT2LMHeadModel.from_pretrained(checkpoint)
    total = sum(float(value.detach().abs().sum()) for value in model.parameters())
    assert result["signal"] == "weight_magnitude"
    assert result["weight_magnitude"] == pytest.approx(total, rel=1e-5)
    hints = load_hints(tmp_path / "h.json")
    sizes = [block.name for block in partition_model(model)]
    assert match_hints(hints, sizes, identify=None).keys() == set(sizes)
    assert hints.provenance["signal"] == "weight_magnitude"
    assert hints.blocks["transformer.ln_f"].importance == 1.0  # weights of 1, biases of 0
    with attach(model, tmp_path / "h.json"):
        logits(model)
    with pytest.raises(InputError, match="--labels and --save-diagonal have no effect with"):
        collect.main([*flags, "--labels", "data"])
    with pytest.raises(InputError, match="'nothing'; there are: fisher_trace, router_counts"):
        collect.main([*flags, "--signal", "nothing"])


def test_a_system_is_listed_where_it_is_for() -> None:
    run_blocks("A system of the benchmark")
    assert [each.name for each in CPU_SETTING.systems].count("transformers-bf16") == 1
    assert "transformers-bf16" not in [each.name for each in CUDA_SETTING.systems]


def write_plugins(folder: Path) -> dict[str, str]:
    """Write the examples as modules; returns the environment in which they are plugins."""
    titles = ["A store", "A kernel", "A signal", "A system of the benchmark"]
    modules = [f"example_{title.split()[1]}" for title in titles]
    for module, title in zip(modules, titles, strict=True):
        (folder / f"{module}.py").write_text(blocks(title)[0])
    (folder / "bucket").mkdir()
    return {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{folder}",
        "BUCKET": str(folder / "bucket"),
        "TIERHINTS_PLUGINS": ",".join(modules),
    }


@pytest.mark.slow
def test_the_benchmark_runs_a_system_of_a_plugin(tmp_path: Path) -> None:
    command = blocks("A system of the benchmark", "sh")[0].split()[1:]
    done = subprocess.run(
        [sys.executable, *command, *("--tokens", "2", "--work-dir", str(tmp_path / "work"))],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=write_plugins(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    resident, run = json.loads(done.stdout.splitlines()[-1])["runs"]
    assert (resident["name"], run["name"]) == ("resident", "transformers-bf16")
    assert run["survived"] and run["label"] == "Transformers in bf16"


def test_the_examples_pass_the_suites_of_their_kinds(tmp_path: Path) -> None:
    suites = re.findall(r"`((?:unit|integration)/\S+\.py)`", PAGE)
    assert len(suites) == 4
    chosen = "OBJECT or int8_fp32 or weight_magnitude or transformers-bf16"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", chosen, *(f"tests/{each}" for each in suites)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=write_plugins(tmp_path),
    )
    assert done.returncode == 0, done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 20, done.stdout
