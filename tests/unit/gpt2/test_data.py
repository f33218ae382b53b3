"""Token shards: the cache, its damage, the tokenizer, and the windows of a step."""

import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gpt2 import data as gpt2_data
from gpt2.data import heldout_windows, prepare_data, sample_windows, unigram_cross_entropy
from lib.config import DataConfig, ModelConfig
from lib.errors import InputError
from lib.text.hub import HubUnreachable

MODEL = ModelConfig(
    pretrained="", layers=1, heads=1, width=8, context=16, vocab_size=300, dropout=0.0, moe=None
)


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    folder = tmp_path / "texts"
    folder.mkdir()
    for index in range(30):
        (folder / f"{index}.txt").write_text(
            f"def function_{index}(x):\n    return x + {index}\n" * 9
        )
    return DataConfig(
        source="files",
        files=str(folder),
        max_mib=1,
        heldout_permille=200,
        tokenizer="",
        cache_dir=str(tmp_path / "cache"),
    )


def test_corpus_holds_every_document_once_and_apart(data: DataConfig) -> None:
    corpus = prepare_data(data, MODEL)
    text = {
        split: corpus.tokenizer.decode(tokens.tolist())
        for split, tokens in (("train", corpus.train), ("heldout", corpus.heldout))
    }
    found = {
        split: {part for part in whole.split("<|endoftext|>") if part}
        for split, whole in text.items()
    }
    assert not found["train"] & found["heldout"]
    assert found["train"] | found["heldout"] == {
        path.read_text() for path in Path(data.files).iterdir()
    }
    assert corpus.train.dtype == np.uint16


def test_tokenizer_of_the_cache_loads_with_transformers(data: DataConfig) -> None:
    from transformers import AutoTokenizer

    corpus = prepare_data(data, MODEL)
    tokenizer = AutoTokenizer.from_pretrained(corpus.directory / "tokenizer")
    text = "def café(x):\n\n\treturn  x"
    assert len(tokenizer) <= MODEL.vocab_size
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token == "<|endoftext|>"


def test_bpe_sees_training_documents_only(
    data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpt2 import tokenizer as gpt2_tokenizer

    seen: list[str] = []
    sample = gpt2_tokenizer._bpe_sample
    monkeypatch.setattr(
        gpt2_tokenizer,
        "_bpe_sample",
        lambda documents: (seen.append(text) or text for text in sample(documents)),
    )
    corpus = prepare_data(data, MODEL)
    heldout = corpus.tokenizer.decode(corpus.heldout.tolist())
    assert seen
    assert not any(text in heldout for text in seen)


def test_second_call_reads_the_cache(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare_data(data, MODEL)
    monkeypatch.setattr(gpt2_data, "_build", lambda *args: pytest.fail("built again"))
    again = prepare_data(data, MODEL)
    assert again.digest == first.digest
    assert np.array_equal(again.train, first.train)
    assert again.unigram_entropy == first.unigram_entropy


@pytest.mark.parametrize("change", ["text", "vocabulary", "split", "cap"])
def test_digest_follows_what_makes_the_shards(data: DataConfig, change: str) -> None:
    before = prepare_data(data, MODEL).digest
    model = MODEL
    if change == "text":
        (Path(data.files) / "0.txt").write_text("another text\n" * 9)
    elif change == "vocabulary":
        model = replace(MODEL, vocab_size=320)
    elif change == "split":
        data = replace(data, heldout_permille=300)
    else:
        data = replace(data, max_mib=2)
    assert prepare_data(data, model).digest != before


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing", "meta"])
def test_damaged_cache_is_rebuilt_with_a_message(
    data: DataConfig, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = prepare_data(data, MODEL)
    tokens = np.array(corpus.train)
    shard = corpus.directory / "train.bin"
    content = bytearray(shard.read_bytes())
    if damage == "truncated":
        shard.write_bytes(content[:-2])
    elif damage == "altered":
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    elif damage == "missing":
        shard.unlink()
    else:
        (corpus.directory / "meta.json").write_text("{")
    assert np.array_equal(prepare_data(data, MODEL).train, tokens)
    assert "is damaged" in capsys.readouterr().err


def test_failed_build_leaves_nothing(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(gpt2_data, "unigram_cross_entropy", fail)
        with pytest.raises(OSError, match=r"disk of .* is full"):
            prepare_data(data, MODEL)
    assert not [path for path in Path(data.cache_dir).iterdir() if path.is_dir()]
    assert len(prepare_data(data, MODEL).train)


def test_concurrent_callers_build_once(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    builds: list[Path] = []
    build = gpt2_data._build
    monkeypatch.setattr(gpt2_data, "_build", lambda *a: (builds.append(a[0]), build(*a)))
    digests: list[str] = []
    threads = [
        threading.Thread(target=lambda: digests.append(prepare_data(data, MODEL).digest))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert len(digests) == 3 and len(set(digests)) == 1


def test_too_little_text_is_an_input_error(data: DataConfig) -> None:
    with pytest.raises(InputError, match=r"held-out tokens, too few .* DATA_HELDOUT_PERMILLE"):
        prepare_data(replace(data, heldout_permille=1), replace(MODEL, context=1000))
    with pytest.raises(InputError, match="training tokens, too few"):
        prepare_data(data, replace(MODEL, context=100_000))


def test_unwritable_cache_is_an_input_error(data: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="DATA_CACHE_DIR"):
        prepare_data(replace(data, cache_dir=str(tmp_path / "file" / "cache")), MODEL)


def test_missing_tokenizer_is_an_input_error(data: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="DATA_TOKENIZER"):
        prepare_data(replace(data, tokenizer=str(tmp_path / "none")), MODEL)


def test_given_tokenizer_is_used_and_part_of_the_digest(data: DataConfig) -> None:
    own = prepare_data(data, MODEL)
    given = prepare_data(replace(data, tokenizer=str(own.directory / "tokenizer")), MODEL)
    assert given.digest != own.digest
    assert np.array_equal(given.train, own.train)


def test_unreachable_hub_falls_back_to_a_corpus_prepared_earlier(
    data: DataConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(data: DataConfig) -> None:
        raise HubUnreachable("no network")

    corpus = prepare_data(data, MODEL)
    monkeypatch.setattr(gpt2_data, "open_source", fail)
    assert prepare_data(data, MODEL).digest == corpus.digest
    assert "prepared earlier" in capsys.readouterr().err
    with pytest.raises(InputError, match="no network"):
        prepare_data(replace(data, max_mib=7), MODEL)


def test_unigram_entropy_is_the_smoothed_cross_entropy() -> None:
    train, heldout = np.array([7, 0, 1]), np.array([2, 1, 1])
    expected = -(2 * np.log(8 / 11) + np.log(1 / 11) + np.log(2 / 11)) / 4
    assert unigram_cross_entropy(train, heldout) == pytest.approx(expected)


def test_windows_are_a_function_of_seed_and_step() -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    options = {"num_windows": 5, "length": 9}
    first = sample_windows(tokens, seed=1, step=2, **options)
    assert np.array_equal(first, sample_windows(tokens, seed=1, step=2, **options))
    assert not np.array_equal(first, sample_windows(tokens, seed=1, step=3, **options))
    assert not np.array_equal(first, sample_windows(tokens, seed=2, step=2, **options))
    assert np.array_equal(first - first[:, :1], np.tile(np.arange(9), (5, 1)))


def test_heldout_windows_are_disjoint_and_spread() -> None:
    tokens = np.arange(103, dtype=np.uint16)
    windows = heldout_windows(tokens, num_windows=100, length=10)
    assert windows.shape == (10, 10)
    assert len(np.unique(windows)) == 100
    assert windows[0, 0] == 0 and windows[-1, -1] == 102


def test_meta_says_what_was_counted(data: DataConfig) -> None:
    corpus = prepare_data(data, MODEL)
    meta = json.loads((corpus.directory / "meta.json").read_text())
    assert meta["tokens"] == {"train": len(corpus.train), "heldout": len(corpus.heldout)}
    assert sum(meta["documents"].values()) == 30
