"""Documents: what is read, in which order, and what is held out."""

from dataclasses import replace
from pathlib import Path

import pytest

from lib.config import DataConfig
from lib.errors import InputError
from lib.text import sources
from lib.text.hub import join_articles
from lib.text.sources import cut_sections, open_source

DATA = DataConfig(
    source="files",
    files="",
    max_mib=1,
    heldout_permille=200,
    tokenizer="",
    cache_dir="data",
)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    for index in range(40):
        path = folder / f"part{index % 3}" / f"{index}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"document number {index}\n" * (index + 1))
    return folder


def heldout_texts(data: DataConfig) -> set[str]:
    return {document.text for document in open_source(data).documents() if document.heldout}


def test_folder_and_glob_read_the_same_documents(texts: Path) -> None:
    folder = open_source(replace(DATA, files=str(texts)))
    pattern = open_source(replace(DATA, files=f"{texts}/**/*.txt"))
    read = [{d.text for d in source.documents()} for source in (folder, pattern)]
    assert read[0] == read[1]
    assert len(read[0]) == 40


def test_hidden_files_of_a_folder_are_left_out(texts: Path) -> None:
    before = open_source(replace(DATA, files=str(texts))).fingerprint
    for path in (texts / ".git" / "index", texts / "part0" / ".cache"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"\xff\xfe not text")
    assert open_source(replace(DATA, files=str(texts))).fingerprint == before
    with pytest.raises(InputError, match="is not UTF-8 text"):
        open_source(replace(DATA, files=str(texts / ".git" / "index")))


def test_order_and_fingerprint_are_functions_of_the_text(texts: Path, tmp_path: Path) -> None:
    data = replace(DATA, files=str(texts))
    first, again = open_source(data), open_source(data)
    assert list(first.documents()) == list(again.documents())
    moved = texts.rename(tmp_path / "elsewhere")
    assert open_source(replace(DATA, files=str(moved))).fingerprint == first.fingerprint
    (moved / "part0" / "0.txt").write_text("another text\n")
    assert open_source(replace(DATA, files=str(moved))).fingerprint != first.fingerprint


def test_documents_stay_held_out_when_the_corpus_grows(texts: Path) -> None:
    data = replace(DATA, files=str(texts))
    before = heldout_texts(data)
    everything = {document.text for document in open_source(data).documents()}
    assert 0 < len(before) < len(everything)
    (texts / "more.txt").write_text("one more document\n")
    assert heldout_texts(data) & everything == before


def test_copies_of_a_document_lie_on_one_side(tmp_path: Path) -> None:
    for index in range(30):
        (tmp_path / f"{index}.txt").write_text(f"text {index // 3}\n" * 20)
    sides: dict[str, set[bool]] = {}
    for document in open_source(replace(DATA, files=str(tmp_path))).documents():
        sides.setdefault(document.text, set()).add(document.heldout)
    assert all(len(side) == 1 for side in sides.values())


def test_small_corpus_still_holds_one_document_out(tmp_path: Path) -> None:
    for index in range(3):
        (tmp_path / f"{index}.txt").write_text(f"text {index}\n" * 20)
    assert len(heldout_texts(replace(DATA, files=str(tmp_path), heldout_permille=1))) == 1


def test_cap_takes_whole_documents(tmp_path: Path) -> None:
    for index in range(12):
        (tmp_path / f"{index}.txt").write_text(f"{index:02d} " * 60_000)
    documents = list(open_source(replace(DATA, files=str(tmp_path))).documents())
    assert len(documents) == 5  # 5 x 180 kB fit into 1 MiB
    assert all(len(document.text) == 180_000 for document in documents)


def test_single_file_is_cut_at_blank_lines(tmp_path: Path) -> None:
    text = "\n\n".join(f"speech {index} " * 30 for index in range(200))
    path = tmp_path / "play.txt"
    path.write_text(text)
    documents = list(open_source(replace(DATA, files=str(path))).documents())
    assert len(documents) > 10
    assert {document.heldout for document in documents} == {True, False}
    words = "".join(sorted(document.text for document in documents)).split()
    assert sorted(words) == sorted(text.split())


def test_sections_keep_their_paragraphs_whole() -> None:
    paragraphs = [f"{index} " * 900 for index in range(5)]
    sections = cut_sections("\n\n".join(paragraphs))
    assert all(
        any(paragraph.strip() in section for section in sections) for paragraph in paragraphs
    )


def test_stdlib_has_source_and_documentation_strings() -> None:
    source = open_source(replace(DATA, source="stdlib", max_mib=64))
    texts = [document.text for document in source.documents()]
    assert any("class OrderedDict(dict):" in text for text in texts)
    assert any("len\nReturn the number of items in a container." in text for text in texts)
    assert source.total_bytes is not None and source.total_bytes > 5e6


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "matches no file"),
        (lambda folder: (folder / "a.txt").write_text(" \n"), "no text"),
        (lambda folder: (folder / "a.txt").write_text("one paragraph"), "one document"),
        (
            lambda folder: [(folder / name).write_bytes(b"\xff\xfe\x00") for name in "ab"],
            "not UTF-8 text",
        ),
    ],
)
def test_unusable_files_are_input_errors(tmp_path: Path, prepare, message: str) -> None:
    prepare(tmp_path)
    with pytest.raises(InputError, match=message):
        open_source(replace(DATA, files=str(tmp_path / "*")))


def test_wikitext_lines_are_joined_into_articles() -> None:
    lines = [
        "",
        " = First = \n",
        "",
        " Text . \n",
        " = = Part = = \n",
        " More . \n",
        " = Second = \n",
        " T \n",
    ]
    assert list(join_articles(lines)) == [
        " = First = \n Text . \n = = Part = = \n More . \n",
        " = Second = \n T \n",
    ]


@pytest.fixture
def local_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset in the layout of the Hub, read by the real library from a folder."""
    from datasets import Dataset

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "dataset"
    for split, count in (("train", 30), ("validation", 3)):
        (folder / split).mkdir(parents=True)
        rows = {"text": [f"{split} story {index}" for index in range(count)]}
        Dataset.from_dict(rows).to_parquet(folder / split / "0.parquet")
    monkeypatch.setattr(sources, "_resolve_revision", lambda hub: "main")
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_dataset_keeps_its_own_validation_split(
    local_hub: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    hub = sources.HubDataset(path=str(local_hub), heldout_split="validation", streaming=streaming)
    monkeypatch.setitem(sources.HUB_DATASETS, "tiny-stories", hub)
    documents = list(open_source(replace(DATA, source="tiny-stories")).documents())
    assert len(documents) == 33
    assert all(d.heldout == d.text.startswith("validation") for d in documents)


def test_hub_dataset_without_validation_is_split_by_hash(
    local_hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = sources.HubDataset(path=str(local_hub))
    monkeypatch.setitem(sources.HUB_DATASETS, "openwebtext", hub)
    documents = list(open_source(replace(DATA, source="openwebtext")).documents())
    assert 0 < sum(document.heldout for document in documents) < 15


def test_unreachable_hub_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", fail)
    with pytest.raises(InputError, match="choose DATA_STDLIB or DATA_FILES"):
        open_source(replace(DATA, source="wikitext-2"))
