"""Prompts of three kinds that every machine has: chats, code, and prose.

Chats are questions of a template each, in the tokenizer's chat template where it has one. Code is
the standard library's; prose is this checkout's documentation and the Python language's, which is
in each Python (``pydoc_data.topics``). Which of them a number of prompts are, the seed says.
"""

import random
import sysconfig
from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.kconfig import ROOT

KINDS = ("chat", "code", "prose")
_ASKED = (
    "Explain {} to a child.",
    "Write a short story about {}.",
    "List five facts about {}.",
    "What are the advantages and the disadvantages of {}?",
    "Write a letter to a friend about {}.",
    "How has {} changed over the last hundred years?",
    "Give me step-by-step advice for somebody who is new to {}.",
    "Write a poem about {}.",
    "Compare {} with its best known alternative.",
    "Why do people care about {}?",
)
_SUBJECTS = (
    "the moon",
    "bicycles",
    "the ocean",
    "learning a language",
    "volcanoes",
    "bread",
    "the printing press",
    "chess",
    "rain",
    "gardening",
    "electric cars",
    "bees",
    "the violin",
    "mountain climbing",
    "prime numbers",
    "coffee",
    "lighthouses",
    "photography",
    "the Roman empire",
    "sleep",
    "railways",
    "dreams",
    "the telephone",
    "cooking rice",
    "penguins",
    "cities at night",
    "public libraries",
    "swimming",
    "glass",
    "honesty",
)
_CHARACTERS_PER_TOKEN = 8
"""More than any text has: so much is read, and then cut to its tokens."""


def read_prompts(
    tokenizer: Any, kind: str, *, count: int, tokens: int, seed: int
) -> list[list[int]]:
    """Return ``count`` prompts as token ids: of ``tokens`` tokens each, chats as long as they are.

    Raises InputError for more chats than there are.
    """
    draw = random.Random(f"{kind} {seed}")
    if kind == "chat":
        asked = [question.format(subject) for question in _ASKED for subject in _SUBJECTS]
        if count > len(asked):
            raise InputError(f"{count} chats are more than the {len(asked)} that there are")
        return [_chat(tokenizer, question) for question in draw.sample(asked, count)]
    texts = _code() if kind == "code" else _prose()
    return [_cut(tokenizer, draw, texts, tokens) for _ in range(count)]


def _chat(tokenizer: Any, question: str) -> list[int]:
    if getattr(tokenizer, "chat_template", None) is None:
        return list(tokenizer(question, add_special_tokens=False)["input_ids"])
    encoded = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True
    )
    return list(encoded["input_ids"])


def _cut(tokenizer: Any, draw: random.Random, texts: list[str], tokens: int) -> list[int]:
    """Return the tokens behind the start of a line, drawn from all over the texts."""
    while True:
        text = draw.choice(texts)
        start = text.find("\n", draw.randrange(len(text))) + 1
        part = text[start : start + _CHARACTERS_PER_TOKEN * tokens]
        ids = list(tokenizer(part, add_special_tokens=False)["input_ids"])[:tokens]
        if len(ids) == tokens and len(set(ids)) > tokens // 4:  # no table of the same signs
            return ids


def _code() -> list[str]:
    folder = Path(sysconfig.get_path("stdlib"))
    return [text for path in sorted(folder.glob("*.py")) if len(text := path.read_text("utf-8"))]


def _prose() -> list[str]:
    from pydoc_data.topics import topics

    pages = [path.read_text("utf-8") for path in sorted((ROOT / "docs").glob("*.md"))]
    return [*pages, *(topics[name] for name in sorted(topics))]
