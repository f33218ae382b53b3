"""Tokenizers: a byte-level BPE trained on the corpus, or one that was trained elsewhere."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

from lib.errors import InputError
from lib.text.sources import Document, Source
from lib.units import MIB

from .distributed import log, show_progress

END_OF_TEXT = "<|endoftext|>"
_BPE_SAMPLE_BYTES = 64 * MIB


def train_bpe(source: Source, vocab_size: int) -> Any:
    """Train a byte-level BPE with GPT-2's pre-tokenization on the training documents (the first
    64 MiB of them).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    log(f"training a BPE of {vocab_size} tokens on {source.name}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress(),
    )
    tokenizer.train_from_iterator(_bpe_sample(source.documents()), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
    )


def _bpe_sample(documents: Iterable[Document]) -> Iterator[str]:
    num_bytes = 0
    for document in documents:
        if document.heldout:
            continue
        yield document.text
        num_bytes += len(document.text.encode())
        if num_bytes >= _BPE_SAMPLE_BYTES:
            return


def load_tokenizer(name: str) -> Any:
    """Load a tokenizer by hub id or folder; it must be a fast one with an end-of-text token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(
            f"tokenizer {name!r} can't be loaded: give a hub id or a folder with tokenizer.json, "
            f"or leave DATA_TOKENIZER empty to train one ({first_line(error)})"
        ) from error
    if not hasattr(tokenizer, "backend_tokenizer") or tokenizer.eos_token_id is None:
        raise InputError(
            f"tokenizer {name!r} has no tokenizer.json or no end-of-text token: choose another "
            "DATA_TOKENIZER"
        )
    return tokenizer


def tokenizer_identity(tokenizer: Any) -> str:
    """Return a hash of all that decides how a tokenizer splits text."""
    text = tokenizer.backend_tokenizer.to_str()
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
