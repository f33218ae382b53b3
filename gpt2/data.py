"""Documents to token shards: the tokenizer, the memory-mapped files, their cache, and which tokens
a step trains on.

A corpus is tokenized once into ``<cache>/<name>-<digest>/``: ``train.bin`` and ``heldout.bin`` (raw
uint16, or uint32 for more than 65536 tokens), ``tokenizer/`` and ``meta.json``. The digest covers
the documents, the split, the tokenizer and the format. A folder is written beside its place and
renamed, so it is whole or absent; damage is found by size and checksum, and repaired by rebuilding.

Each document is followed by the end-of-text token. Batches are windows at random places of the
training stream, and a pure function of (seed, step), so that a resumed run sees the same text as an
unbroken one.
"""

import errno
import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lib.config import DataConfig, ModelConfig
from lib.errors import InputError
from lib.text.hub import HubUnreachable
from lib.text.sources import Document, Source, open_source
from lib.units import MIB, format_seconds

from .distributed import log, show_progress
from .tokenizer import first_line, load_tokenizer, tokenizer_identity, train_bpe

FORMAT_VERSION = 1
_ENCODE_BYTES = 4 * MIB
_CHECKSUM_PIECES, _CHECKSUM_PIECE_BYTES = 64, MIB

Tokens = NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Token streams of one corpus, mapped from disk.

    ``unigram_entropy`` is in nats per token: the cross-entropy of the held-out tokens under the
    unigram frequencies of the training tokens with add-one smoothing. It is the held-out loss of
    the best model that ignores context, hence the mark to beat.
    """

    name: str
    digest: str
    directory: Path
    tokenizer: Any
    train: Tokens
    heldout: Tokens
    unigram_entropy: float


class _DamagedCache(Exception):
    """A cached corpus is incomplete or altered; the message says how."""


def prepare_data(data: DataConfig, model: ModelConfig) -> Corpus:
    """Return the corpus, from the cache or tokenized now; only one process builds, others wait for
    it.

    Raises InputError for an empty or unreadable source, and for too few tokens for the model's
    context.
    """
    tokenizer_name = data.tokenizer or model.pretrained
    tokenizer = load_tokenizer(tokenizer_name) if tokenizer_name else None
    request = {
        "source": data.source,
        "max_mib": data.max_mib,
        "heldout_permille": data.heldout_permille,
        "tokenizer": tokenizer_identity(tokenizer) if tokenizer else f"bpe-{model.vocab_size}",
    }
    cache = Path(data.cache_dir)
    try:
        source = open_source(data)
    except HubUnreachable as error:
        corpus = _find_cached(cache, request)
        if corpus is None:
            raise
        log(f"{error}; using {corpus.directory}, prepared earlier")
    else:
        key = {
            **request,
            "format": FORMAT_VERSION,
            "name": source.name,
            "fingerprint": source.fingerprint,
        }
        digest = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=8)
        directory = cache / f"{source.name}-{digest.hexdigest()}"
        with _locked(cache, directory.name):
            corpus = _load_or_build(directory, source, request, tokenizer, model.vocab_size)
    _check_enough(corpus, data, model.context)
    return corpus


def sample_windows(
    tokens: Tokens, *, seed: int, step: int, num_windows: int, length: int
) -> NDArray[np.int64]:
    """Return (num_windows, length) token ids from random places, a function of seed and step."""
    generator = np.random.Generator(np.random.PCG64([seed, step]))
    starts = generator.integers(0, len(tokens) - length + 1, size=num_windows)
    return np.stack([tokens[start : start + length] for start in starts]).astype(np.int64)


def heldout_windows(tokens: Tokens, *, num_windows: int, length: int) -> NDArray[np.int64]:
    """Return up to ``num_windows`` disjoint windows (n, length), spread evenly over the held-out
    stream.
    """
    num_windows = min(num_windows, len(tokens) // length)
    starts = np.linspace(0, len(tokens) - length, num_windows).astype(np.int64)
    return np.stack([tokens[start : start + length] for start in starts]).astype(np.int64)


def _load_or_build(
    directory: Path, source: Source, request: Mapping[str, Any], tokenizer: Any, vocab_size: int
) -> Corpus:
    if directory.exists():
        try:
            return _load(directory)
        except _DamagedCache as error:
            log(f"cached corpus {directory} is damaged ({error}): building it anew")
            shutil.rmtree(directory)
    # The lock makes this process the only builder: what is there was left by one that was killed.
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        _build(partial, source, request, tokenizer, vocab_size)
        partial.rename(directory)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(
            f"the disk of {directory.parent} is full: free some space, or set DATA_CACHE_DIR to a "
            "folder of another disk"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return _load(directory)


def _build(
    folder: Path, source: Source, request: Mapping[str, Any], tokenizer: Any, vocab_size: int
) -> None:
    """Write tokenizer, shards and meta.json of a source into an empty folder."""
    if tokenizer is None:
        started = time.perf_counter()
        tokenizer = train_bpe(source, vocab_size)
        log(f"trained a BPE of {len(tokenizer)} tokens in {format_seconds(_since(started))}")
    tokenizer.save_pretrained(folder / "tokenizer")
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
    counts = {split: np.zeros(len(tokenizer), np.int64) for split in ("train", "heldout")}
    num_documents = dict.fromkeys(counts, 0)
    started = time.perf_counter()
    with (folder / "train.bin").open("wb") as train, (folder / "heldout.bin").open("wb") as heldout:
        for document, ids in _encode(source, tokenizer):
            split, file = ("heldout", heldout) if document.heldout else ("train", train)
            file.write(ids.astype(dtype).tobytes())
            counts[split] += np.bincount(ids, minlength=len(tokenizer))
            num_documents[split] += 1
    num_tokens = {split: int(count.sum()) for split, count in counts.items()}
    for split, number in num_tokens.items():
        if not number:
            raise InputError(
                f"data source {source.name!r} gives no {split} text at all: give more text, or "
                "raise DATA_HELDOUT_PERMILLE or DATA_MAX_MIB"
            )
    meta = {
        "request": request,
        "name": source.name,
        "dtype": dtype.name,
        "tokens": num_tokens,
        "documents": num_documents,
        "checksums": {split: _checksum(folder / f"{split}.bin") for split in counts},
        "unigram_entropy_nats": unigram_cross_entropy(counts["train"], counts["heldout"]),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    log(
        f"tokenized {source.name}: {num_tokens['train']:,} training tokens of "
        f"{num_documents['train']} documents, {num_tokens['heldout']:,} held-out tokens of "
        f"{num_documents['heldout']}, in {format_seconds(_since(started))}"
    )


def unigram_cross_entropy(
    train_counts: NDArray[np.int64], heldout_counts: NDArray[np.int64]
) -> float:
    """Return nats per held-out token under the add-one smoothed unigram frequencies of the
    training tokens.
    """
    probability = (train_counts + 1) / (train_counts.sum() + len(train_counts))
    return float(-(heldout_counts * np.log(probability)).sum() / heldout_counts.sum())


def _encode(source: Source, tokenizer: Any) -> Iterator[tuple[Document, NDArray[np.int64]]]:
    """Tokenize documents in parallel batches; each ends with the end-of-text token."""
    from tqdm import tqdm

    with tqdm(
        total=source.total_bytes,
        desc="tokenizing",
        unit="B",
        unit_scale=True,
        disable=not show_progress(),
    ) as bar:
        for batch in _batches(source.documents()):
            encodings = tokenizer.backend_tokenizer.encode_batch_fast(
                [document.text for document in batch], add_special_tokens=False
            )
            for document, encoding in zip(batch, encodings, strict=True):
                yield document, np.array([*encoding.ids, tokenizer.eos_token_id], np.int64)
                bar.update(len(document.text.encode()))


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    num_characters = 0
    for document in documents:
        batch.append(document)
        num_characters += len(document.text)
        if num_characters >= _ENCODE_BYTES:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _load(directory: Path) -> Corpus:
    """Map a cached corpus; raises _DamagedCache when a file is missing, cut short or altered."""
    from transformers import AutoTokenizer

    try:
        meta = json.loads((directory / "meta.json").read_text())
        tokens = {}
        for split in ("train", "heldout"):
            path = directory / f"{split}.bin"
            expected = meta["tokens"][split] * np.dtype(meta["dtype"]).itemsize
            if path.stat().st_size != expected:
                raise _DamagedCache(
                    f"{path.name} has {path.stat().st_size} bytes instead of {expected}"
                )
            if _checksum(path) != meta["checksums"][split]:
                raise _DamagedCache(f"{path.name} has another checksum than when it was written")
            tokens[split] = np.memmap(path, dtype=meta["dtype"], mode="r")
        tokenizer = AutoTokenizer.from_pretrained(directory / "tokenizer")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _DamagedCache(f"{type(error).__name__}: {first_line(error)}") from error
    return Corpus(
        name=meta["name"],
        digest=directory.name.rpartition("-")[2],
        directory=directory,
        tokenizer=tokenizer,
        train=tokens["train"],
        heldout=tokens["heldout"],
        unigram_entropy=meta["unigram_entropy_nats"],
    )


def _find_cached(cache: Path, request: Mapping[str, Any]) -> Corpus | None:
    """Return the newest whole corpus that was made for the same request."""
    found = sorted(cache.glob("*/meta.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in found:
        try:
            if json.loads(path.read_text())["request"] == request:
                return _load(path.parent)
        except (_DamagedCache, ValueError, KeyError) as error:
            log(f"cached corpus {path.parent} is damaged ({error}): left aside")
    return None


def _check_enough(corpus: Corpus, data: DataConfig, context: int) -> None:
    if len(corpus.train) <= context:
        raise InputError(
            f"{corpus.name} has {len(corpus.train)} training tokens, too few for one sequence of "
            f"GPT2_CONTEXT={context}: give more text, or lower GPT2_CONTEXT"
        )
    if len(corpus.heldout) < context:
        raise InputError(
            f"{corpus.name} has {len(corpus.heldout)} held-out tokens, too few for one sequence "
            f"of GPT2_CONTEXT={context}: give more text, raise DATA_HELDOUT_PERMILLE (now "
            f"{data.heldout_permille}), or lower GPT2_CONTEXT"
        )


def _checksum(path: Path) -> str:
    """Hash a file, or 64 MiB spread evenly over it when it is larger."""
    digest = hashlib.blake2b(digest_size=16)
    size = path.stat().st_size
    with path.open("rb") as file:
        for index in range(_CHECKSUM_PIECES):
            start = size * index // _CHECKSUM_PIECES
            end = size * (index + 1) // _CHECKSUM_PIECES
            file.seek(start)
            digest.update(file.read(min(end - start, _CHECKSUM_PIECE_BYTES)))
    return digest.hexdigest()


@contextmanager
def _locked(cache: Path, name: str) -> Iterator[None]:
    """Let one process at a time look at, or build, one corpus of the cache."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        file = (cache / f".{name}.lock").open("w")
    except OSError as error:
        raise InputError(
            f"DATA_CACHE_DIR={str(cache)!r} can't be written ({error.strerror}): give a writable "
            "folder"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"waiting for another process that prepares {name}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _since(started: float) -> float:
    return time.perf_counter() - started
