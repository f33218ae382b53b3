"""Held-out text as a user names it on a command line, or the checkpoint's own.

Whatever is wrong with what the user names raises InputError with one line.
"""

import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..checkpoint.load import first_line
from ..config import DataConfig
from ..errors import InputError
from .files import find_text_files, make_sequences, read_chunks
from .sources import open_source

HELDOUT_FILE = "heldout.safetensors"
_STDLIB = DataConfig(
    source="stdlib", files="", max_mib=32, heldout_permille=5, tokenizer="", cache_dir=""
)
"""So few documents that a model trained with a larger held-out part has not seen them either."""
_STDLIB_TOKENS = 65_536
_SHARED_RUN = 32
"""Equal tokens in a row that make two texts the same; boilerplate is shorter."""
LONGEST = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutText:
    """Tokens that the model was not trained on: int64, (sequences, length), on the CPU."""

    tokens: Tensor
    source: str


def load_heldout(model: str, *, vocab_size: int, length: int) -> HeldOutText:
    """Return sequences of ``length``: the model folder's own held-out tokens, else library text."""
    path = Path(model) / HELDOUT_FILE
    tokens, source = _read_heldout(path) if path.exists() else _tokenize_stdlib(model)
    per_row = tokens.shape[1] // length
    if not per_row or not len(tokens):
        raise InputError(
            f"held-out text ({source}) has rows of {tokens.shape[1]} tokens: "
            f"the sequence length {length} must not be longer"
        )
    low, high = int(tokens.min()), int(tokens.max())
    if not 0 <= low <= high < vocab_size:
        raise InputError(
            f"held-out tokens ({source}) lie in {low}..{high}, the model's vocabulary in "
            f"0..{vocab_size - 1}: they were made by another tokenizer"
        )
    tokens = tokens[:, : per_row * length].reshape(-1, length).contiguous()
    return HeldOutText(tokens=tokens, source=source)


def load_library_text(model: str, *, length: int) -> HeldOutText:
    """Return sequences of held-out documents of the standard library, by the model's tokenizer.

    Those that share a run of ``_SHARED_RUN`` tokens with the model folder's own held-out tokens are
    left out: what those were used for has not seen these.
    """
    tokens, source = _tokenize_stdlib(model)
    rows = tokens[:, : tokens.shape[1] // length * length].reshape(-1, length)
    path = Path(model) / HELDOUT_FILE
    if path.exists():
        seen = {run for row in _read_heldout(path)[0].tolist() for run in _runs(row)}
        new = [seen.isdisjoint(_runs(row)) for row in rows.tolist()]
        rows, source = rows[torch.tensor(new)], f"{source}, without the model's held-out text"
    return HeldOutText(tokens=rows, source=source)


def _runs(row: list[int]) -> set[tuple[int, ...]]:
    """Return all runs of ``_SHARED_RUN`` tokens of a row."""
    return {tuple(row[start : start + _SHARED_RUN]) for start in range(len(row) - _SHARED_RUN + 1)}


def load_tokenizer(model: str) -> Any:
    """Load the tokenizer of a hub id or folder; InputError for one without a vocabulary."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        # A folder without tokenizer files gives one of the model type that knows no words.
        usable = bool(tokenizer("text", add_special_tokens=False)["input_ids"])
        reason = "its vocabulary is empty"
    except (OSError, ValueError, KeyError) as error:
        usable, reason = False, " ".join(str(error).split())[:200]
    if not usable:
        raise InputError(
            f"model {model!r} has no usable tokenizer ({reason}): add its tokenizer files"
        )
    return tokenizer


def sequence_length(config: Any, asked: int | None, *, longest: int = LONGEST) -> int:
    """Return the sequence length to use, within the model's context; raises InputError.

    ``longest`` is it where none was asked for, and the context is no shorter.
    """
    context = getattr(config, "max_position_embeddings", None)
    if asked is None:
        return min(longest, context or longest)
    if asked < 2 or (context is not None and asked > context):
        raise InputError(
            f"the sequence length {asked} must be from 2 to the model's context of {context} tokens"
        )
    return asked


def read_text(
    model: str, data: str | None, *, vocab_size: int, length: int, count: int, seed: int
) -> HeldOutText:
    """Return at most ``count`` sequences of the user's text, or of ``load_heldout`` without one.

    The user's text is drawn from all over its files by ``seed``. What a short one lacks is said on
    stderr; the caller decides how few are too few.
    """
    if data is None:
        text = load_heldout(model, vocab_size=vocab_size, length=length)
        return HeldOutText(tokens=text.tokens[:count], source=text.source)
    chunks = read_chunks(find_text_files(data), seed=seed)
    tokenizer = load_tokenizer(model)
    tokens = make_sequences(tokenizer, chunks, length=length, count=count, data=data)
    if len(tokens) < count:
        print(
            f"{data} holds {len(tokens)} sequences of {length} tokens, not {count}: all are used",
            file=sys.stderr,
        )
    return HeldOutText(tokens=tokens, source=data)


def read_tokens(
    model: str | Path,
    data: str | Path | None = None,
    *,
    count: int = 64,
    length: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Return text as a model's token ids: int64, at most (``count``, ``length``), on the CPU.

    ``model``: folder or hub id, for its tokenizer. ``data``: UTF-8 text or JSON Lines, a file, a
    folder or a glob, of which sequences are drawn from all over by ``seed`` (default: the folder's
    held-out text, else the Python standard library's). ``length``: default the model's context, at
    most 512. Raises InputError for files that can't be read, or hold less than one sequence.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise InputError(f"model {str(model)!r} can't be read: {first_line(error)}") from error
    return read_text(
        str(model),
        None if data is None else str(data),
        vocab_size=int(config.get_text_config().vocab_size),
        length=sequence_length(config, length),
        count=count,
        seed=seed,
    ).tokens


def _read_heldout(path: Path) -> tuple[Tensor, str]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tokens = file.get_tensor("tokens").clone()
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"held-out tokens {path} can't be read: {first_line(error)}; train again"
        ) from error
    if tokens.dim() != 2 or tokens.dtype != torch.int64:
        shape = tuple(tokens.shape)
        raise InputError(
            f"held-out tokens {path} are {tokens.dtype} {shape}, expected int64 (sequences, length)"
        )
    return tokens, f"held-out split of {metadata.get('corpus', 'the training corpus')}"


def _tokenize_stdlib(model: str) -> tuple[Tensor, str]:
    """Tokenize documents of the standard library with the model's own tokenizer, as one row."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{_no_text(model)} ({first_line(error)})") from error
    ids: list[int] = []
    for document in open_source(_STDLIB).documents():
        if document.heldout:
            ids += tokenizer(document.text, verbose=False)["input_ids"]
        if len(ids) >= _STDLIB_TOKENS:
            break
    if not ids:  # transformers makes an empty tokenizer of a folder without a tokenizer's files
        raise InputError(_no_text(model))
    source = f"part of the Python {platform.python_version()} standard library"
    return torch.tensor([ids], dtype=torch.int64), source


def _no_text(model: str) -> str:
    return (
        f"model {model!r} has neither {HELDOUT_FILE} nor a tokenizer, so there is no text to "
        "measure on: add its tokenizer's files"
    )
