"""Text of four kinds that every machine has."""

import json
from pathlib import Path

import pytest

from lib.config import DataConfig
from lib.errors import InputError
from lib.text import library
from lib.text.library import KINDS, kind_texts
from lib.text.sources import open_source

DATA = DataConfig(
    source="kinds", files="", max_mib=1, heldout_permille=100, tokenizer="", cache_dir=""
)


def test_documents_are_of_every_kind_in_equal_shares_and_mixed() -> None:
    documents = list(open_source(DATA).documents())
    sizes = dict.fromkeys(KINDS, 0)
    for document in documents:
        sizes[document.kind] += len(document.text.encode())
    assert all(0.9 * 2**18 < size <= 2**18 for size in sizes.values())
    assert {d.kind for d in documents if d.heldout} == {*KINDS}
    assert {d.kind for d in documents[: len(documents) // 4]} == {*KINDS}
    assert len({d.text for d in documents}) == len(documents)


def test_the_same_machine_gives_the_same_text() -> None:
    assert kind_texts("json", max_bytes=2**14) == kind_texts("json", max_bytes=2**14)


def test_syntax_trees_are_json(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text("x: bytes = b'\\xff' + f(1j, ...)\n")
    tree = json.loads(library._tree(path) or "")
    assert tree["node"] == "Module" and tree["body"][0]["target"]["id"] == "x"
    path.write_text("def f(:\n")
    assert library._tree(path) is None


def test_a_kind_without_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "c", lambda: iter([("empty.h", lambda: " ")]))
    with pytest.raises(InputError, match="no text of the kind 'c' within 9 bytes"):
        kind_texts("c", max_bytes=9)
