"""The same words give the same text, whatever program wrote the file; the rest is refused."""

import codecs
import gzip
import io
import json
import random
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lib.config import DataConfig
from lib.errors import InputError
from lib.text.files import find_text_files, read_chunks
from lib.text.sources import open_source

DATA = DataConfig(
    source="files", files="", max_mib=1, heldout_permille=200, tokenizer="", cache_dir="data"
)
READERS: dict[str, Callable[[Path], list[str]]] = {
    "--data": lambda path: list(read_chunks(find_text_files(str(path)), seed=3)),
    "training": lambda path: [
        document.text for document in open_source(replace(DATA, files=str(path))).documents()
    ],
}


@pytest.fixture(params=READERS)
def read(request: pytest.FixtureRequest) -> Callable[[Path], list[str]]:
    return READERS[request.param]


def words(count: int) -> str:
    """Paragraphs of lines of all lengths, with characters of one to four bytes."""
    dice = random.Random(0)
    lines = []
    for _ in range(count):
        lines.append("".join(dice.choice("ab ä€😀") for _ in range(dice.randint(0, 60))))
    return "\n".join(lines)


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8], ids=["no mark", "mark"])
@pytest.mark.parametrize("end", ["\r\n", "\r"], ids=["CRLF", "CR"])
@pytest.mark.parametrize("lines", [200, 4000])
def test_line_ends_and_marks_leave_no_trace(
    tmp_path: Path, read: Callable[[Path], list[str]], lines: int, end: str, mark: bytes
) -> None:
    plain, other = tmp_path / "plain.txt", tmp_path / "other.txt"
    text = words(lines) + "\n\nlast"
    plain.write_bytes(text.encode())
    other.write_bytes(mark + text.replace("\n", end).encode())
    expected = read(plain)
    assert read(other) == expected
    assert not any("\r" in chunk or "\ufeff" in chunk for chunk in expected)


@pytest.mark.parametrize("pairs", [16 * 1024, 20_000, 40_001])
@pytest.mark.parametrize("shift", [0, 1])
def test_nothing_but_line_ends_is_cut_as_well(tmp_path: Path, pairs: int, shift: int) -> None:
    plain, other = tmp_path / "plain.txt", tmp_path / "other.txt"
    text = "x" * shift + "\n" * pairs
    plain.write_bytes(text.encode())
    other.write_bytes(text.replace("\n", "\r\n").encode())
    assert READERS["--data"](other) == READERS["--data"](plain)


def records(texts: list[str], **extra: object) -> str:
    return "".join(json.dumps({"text": text, **extra}) + "\n" for text in texts)


TEXTS = [f"story {n}\nof {'long ' * (n * 40)}words" for n in range(60)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.JSONL", "a.txt", "a"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\n\n"])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8], ids=["no mark", "mark"])
def test_each_record_is_a_text_read_once(
    tmp_path: Path, read: Callable[[Path], list[str]], name: str, end: str, mark: bytes
) -> None:
    path = tmp_path / name
    content = records([text.replace("\n", "\r\n") for text in TEXTS], other="ä").rstrip("\n")
    path.write_bytes(mark + content.replace("\n", end).encode())
    assert sorted(read(path)) == sorted(TEXTS)


def test_records_of_several_files_are_capped_and_mixed_with_plain_text(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(records([f"{name} {n} " + "x" * 9_000 for n in range(100)]))
    (tmp_path / "c.txt").write_text("plain")
    texts = READERS["training"](tmp_path)
    assert "plain" in texts and 90 < len(texts) < 2**20 / 9_000 + 2
    assert set(READERS["--data"](tmp_path)) > set(texts)


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", "words")
    return buffer.getvalue()


REFUSED: list[tuple[str, bytes, str]] = [
    ("a.jsonl", b'{"content": "x", "meta": 1}\n', "no 'text', its keys are 'content', 'meta'"),
    ("a.jsonl", b'{"text": null}\n', "has a NoneType as its 'text'"),
    ("a.jsonl", b'{"text": ["x"]}\n', "has a list as its 'text'"),
    ("a.jsonl", b'"x"\n', "is a JSON str, not an object"),
    ("a.jsonl", b'{"text": "x"}\n{"text": \n', "is not a JSON record"),
    ("a.jsonl", b'{"text": "\xe4"}\n', "is not UTF-8 text"),
    ("a.json", b'[{"text": "x"}]', "is one JSON array: write one record a line"),
    ("a.json", b'{\n  "text": "x"\n}\n', "is not a JSON record"),
    ("a.txt", b'{"content": "x"}\n', "no 'text', its keys are 'content'"),
    ("a.csv", b"text,label\nwords,1\n", "is a table"),
    ("a.TSV", b"text\tlabel\n", "is a table"),
    ("a.parquet", b"PAR1xx", "is a table"),
    ("a", b"PAR1xx", "is a table"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "x"}', mtime=0), "is compressed: unpack it first"),
    ("a.txt", gzip.compress(b"words", mtime=0), "is compressed: unpack it first"),
    ("a.txt.zst", b"\x28\xb5\x2f\xfdxx", "is compressed: unpack it first"),
    ("a.zip", zipped(), "is compressed"),
    ("a.txt", zipped(), "is compressed"),
    ("a.pdf", b"%PDF-1.7\n", "is a document with layout"),
    ("a.ipynb", b'{"cells": []}', "is a notebook"),
    ("a.txt", "words".encode("utf-16"), "UTF-16: convert it"),
    ("a.txt", codecs.BOM_UTF16_BE + "words".encode("utf-16-be"), "UTF-16: convert it"),
    ("a.txt", "words".encode("utf-32"), "UTF-32: convert it"),
    ("a.txt", "words".encode("utf-16-le"), "is not UTF-8 text .*UTF-16"),
    ("a.jsonl", records(["x"]).encode("utf-16"), "UTF-16: convert it"),
    ("a.txt", b"caf\xe9 au lait", "is not UTF-8 text"),
    ("a.txt", b"words\0words", "is not UTF-8 text .*zero bytes"),
]


@pytest.mark.parametrize(("name", "content", "message"), REFUSED)
def test_what_is_no_text_is_refused_by_name(
    tmp_path: Path, read: Callable[[Path], list[str]], name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as raised:
        read(path)
    assert str(path) in str(raised.value)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    for index, (name, content, _) in enumerate(REFUSED):
        (tmp_path / f"{index}{name}").write_bytes(content)
    return tmp_path


def test_in_a_folder_it_is_skipped_with_a_warning(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="--data holds no text: "):
        READERS["--data"](folder)
    (folder / "words.txt").write_text("words")
    capsys.readouterr()
    assert [chunk for chunk in READERS["--data"](folder) if chunk != "x"] == ["words"]
    shown = capsys.readouterr().err
    assert all(f"{suffix} " in shown for suffix in (".jsonl", ".csv", ".gz", ".pdf", ".txt"))
    with pytest.raises(InputError, match="leave it out of DATA_FILES_GLOB"):
        READERS["training"](folder)
