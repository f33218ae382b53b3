"""Tokens to text while they come, no character cut in two.

A token alone may be half a character, or a word whose space depends on the one before: each is
decoded behind those of the piece before it, and given once its characters are whole.
"""

from collections.abc import Sequence
from typing import Any

CONTEXT_TOKENS = 8
"""Tokens of the prompt by which the first new one is decoded."""
_REPLACEMENT = "\ufffd"
"""What decoders give for bytes that are no character, or not yet."""


class Detokenizer:
    """The text of the tokens of one answer."""

    def __init__(
        self, tokenizer: Any, prompt: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids = list(prompt[-CONTEXT_TOKENS:])
        self._num_shown = len(self._ids)
        """Tokens whose text was given."""
        self._context = 0
        """The token from which those that follow are decoded."""

    def put(self, ids: Sequence[int]) -> str:
        """Take tokens; returns the text that is whole with them."""
        self._ids += ids
        return self._show(whole=False)

    def end(self) -> str:
        """Return what was not complete yet."""
        return self._show(whole=True)

    def _show(self, *, whole: bool) -> str:
        before = self._decode(self._ids[self._context : self._num_shown])
        text = self._decode(self._ids[self._context :])[len(before) :]
        if not text or (text.endswith(_REPLACEMENT) and not whole):  # a character's first bytes
            return ""
        self._context, self._num_shown = self._num_shown, len(self._ids)
        return text

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=self._skip))
