"""Text comes in whole characters, and all of it."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.text.detokenize import Detokenizer
from tests.integration.test_collect_fisher import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd")))
def test_pieces_are_whole_characters(tokenizer: Any, text: str) -> None:
    detokenizer = Detokenizer(tokenizer, tokenizer("prompt")["input_ids"])
    pieces = [detokenizer.put([token]) for token in tokenizer(text)["input_ids"]]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == text and detokenizer.end() == ""


def test_half_a_character_comes_at_the_end(tokenizer: Any) -> None:
    detokenizer = Detokenizer(tokenizer)
    first, *_ = tokenizer("\u20ac")["input_ids"]
    assert detokenizer.put([first]) == ""
    assert detokenizer.end() == "\ufffd"


def test_special_tokens_are_left_out_unless_asked_for(tokenizer: Any) -> None:
    end = [tokenizer.eos_token_id]
    assert Detokenizer(tokenizer).put(end) == ""
    assert Detokenizer(tokenizer, skip_special_tokens=False).put(end) == "</s>"
