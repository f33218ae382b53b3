"""Datasets of the Hugging Face Hub, as streams of texts."""

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..extras import need_extra
from .formats import normalize_newlines

_WIKITEXT_TITLE = re.compile(r"^ = [^=].* = \n?$")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubDataset:
    """How one dataset of the Hub is read. Without a ``heldout_split`` of its own, documents are
    held out by hash.
    """

    path: str
    subset: str | None = None
    revision: str = "main"
    column: str = "text"
    heldout_split: str | None = None
    streaming: bool = False
    articles: bool = False


HUB_DATASETS = {
    "wikitext-2": HubDataset(
        path="Salesforce/wikitext",
        subset="wikitext-2-raw-v1",
        heldout_split="validation",
        articles=True,
    ),
    "wikitext-103": HubDataset(
        path="Salesforce/wikitext",
        subset="wikitext-103-raw-v1",
        heldout_split="validation",
        articles=True,
    ),
    # The main branch holds a loading script, which datasets >= 4 refuses; the Hub's own parquet
    # conversion is the same text.
    "tiny-shakespeare": HubDataset(
        path="karpathy/tiny_shakespeare",
        revision="refs/convert/parquet",
        heldout_split="validation",
    ),
    "tiny-stories": HubDataset(
        path="roneneldan/TinyStories", heldout_split="validation", streaming=True
    ),
    "openwebtext": HubDataset(path="Skylion007/openwebtext", streaming=True),
    "fineweb-edu": HubDataset(
        path="HuggingFaceFW/fineweb-edu", subset="sample-10BT", streaming=True
    ),
}


class HubUnreachable(InputError):
    """The Hub can't be asked for a dataset's revision; a corpus prepared earlier may still
    serve.
    """


def _resolve_revision(hub: HubDataset) -> str:
    """Ask the Hub which commit the dataset's branch is at."""
    need_extra("data", "datasets")
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(hub.path, revision=hub.revision, timeout=20).sha
    except (
        Exception
    ) as error:  # the client raises its HTTP library's own errors, which change between versions
        raise HubUnreachable(
            f"dataset {hub.path!r} can't be reached on the Hub ({type(error).__name__}): check "
            "the network and HF_HUB_OFFLINE, or choose DATA_STDLIB or DATA_FILES, which need no "
            "network"
        ) from error
    return str(commit)


def _hub_texts(name: str, hub: HubDataset, revision: str, split: str) -> Iterator[str]:
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        rows: Iterable[dict[str, Any]] = datasets.load_dataset(
            hub.path, hub.subset, split=split, revision=revision, streaming=hub.streaming
        )
    except (OSError, RuntimeError, ValueError) as error:  # DatasetNotFoundError is an OSError
        raise InputError(
            f"dataset {name!r} ({hub.path}, split {split!r}) can't be loaded: {error}"
        ) from error
    texts = (normalize_newlines(row[hub.column]) for row in rows)
    return join_articles(texts) if hub.articles else texts


def join_articles(lines: Iterable[str]) -> Iterator[str]:
    """Join WikiText's lines into articles, which begin at a first-level heading `` = Title = ``."""
    article: list[str] = []
    for line in lines:
        if _WIKITEXT_TITLE.match(line) and any(part.strip() for part in article):
            yield "".join(article)
            article = []
        article.append(line)
    if any(part.strip() for part in article):
        yield "".join(article)
