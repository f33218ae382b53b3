"""docs/api.md: it names every public name with its signature, and its examples run in order."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from test_collect_fisher import byte_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

import lib

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "api.md").read_text()
SHOWN = {
    name: short or " ".join(long.split())
    for name, short, long in re.findall(
        r"^### `(\w+)(?:\((.*)\))?`$(?:\n\n```text\n\1\(([^`]*)\)\n```)?", PAGE, re.M
    )
}
"""Name -> signature, in the heading or, a long one, in a block below; empty for the errors."""


def test_every_public_name_is_on_the_page() -> None:
    assert sorted(SHOWN) == sorted(lib.__all__)
    assert {name for name in SHOWN if not SHOWN[name]} == {"InputError", "PlacementError"}


@pytest.mark.parametrize("name", [name for name in SHOWN if SHOWN[name]])
def test_a_signature_is_that_of_the_code(name: str) -> None:
    empty = inspect.Parameter.empty
    parameters = inspect.signature(getattr(lib, name)).parameters.values()
    plain = inspect.Signature([each.replace(annotation=empty) for each in parameters])
    code = re.sub(r"<\w+\.\w+: ('\w+')>", r"\1", str(plain))  # an enum's member is its text
    assert f"({SHOWN[name]})" == code


@pytest.mark.parametrize("name", lib.__all__)
def test_a_name_has_a_docstring_and_completes(name: str) -> None:
    assert name in dir(lib)
    assert inspect.getdoc(getattr(lib, name))


@pytest.fixture
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=16, n_positions=32, vocab_size=258, eos_token_id=257
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "my-model")
    byte_tokenizer().save_pretrained(tmp_path / "my-model")
    (tmp_path / "book.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_folder")
def test_the_examples_run_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    examples = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    namespace = {"__name__": "example"}
    for example in examples:
        exec(compile(example, "docs/api.md", "exec", dont_inherit=True), namespace)
    used = " ".join(examples)
    assert all(f"tierhints.{name}" in used for name in set(SHOWN) - {"PlacementError"})
    assert Path("export/device_map.json").is_file()
    assert "is too small: the smallest that works is HBM=" in capsys.readouterr().out


def test_other_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="module 'tierhints' has no attribute 'nothing'"):
        _ = lib.nothing
