"""One answer on its way from the engine's tokens to what a reply has of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..progressive.generation import Finish, Outcome, Token
from ..text.detokenize import Detokenizer
from .errors import ApiError
from .stops import StopFinder
from .tools import Reader, Reading, ToolCall

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True)
class TokenText:
    """A token beside its text."""

    token: Token
    text: str
    offset: int
    """Where the text of the answer has it, in characters."""


@dataclass(slots=True)
class Piece:
    """What a few tokens have added to an answer."""

    content: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    arguments: str = ""
    """More of the last call's, of this piece or an earlier one."""
    tokens: list[TokenText] = field(default_factory=list)

    def add(self, reading: Reading) -> None:
        """Add what was read."""
        self.content += reading.content
        self.reasoning += reading.reasoning
        self.calls += reading.calls
        self.arguments += reading.arguments

    def __bool__(self) -> bool:
        own = self.content or self.reasoning or self.calls or self.arguments or self.tokens
        return bool(own)


class Choice:
    """Reads the events of one answer. ``keep_tokens``: pieces have their tokens, too."""

    def __init__(
        self,
        index: int,
        tokenizer: Any,
        *,
        prompt: Sequence[int],
        prompt_number: int = 0,
        reader: Reader,
        stops: Sequence[str] = (),
        keep_tokens: bool = False,
        raw: bool = False,
        one_call: bool = False,
    ) -> None:
        self.index = index
        self.prompt_number = prompt_number
        self.prompt_tokens = len(prompt)
        self.new_tokens = 0
        self.outcome: Outcome | None = None
        self.finish_reason: FinishReason | None = None
        """None: it goes on."""
        self._tokenizer = tokenizer
        self._text = Detokenizer(tokenizer, prompt, skip_special_tokens=not raw)
        self._stops = StopFinder(stops)
        self._reader = reader
        self._keep_tokens = keep_tokens
        self._one_call = one_call
        self._called = False
        self._length = 0

    @property
    def has_enough(self) -> bool:
        """Whether it has ended of itself, so that the engine need not go on."""
        return self._stops.found or (self._one_call and self._called)

    def take(self, tokens: Sequence[Token]) -> Piece:
        """Take tokens; those after its end are left out."""
        piece = Piece()
        for token in tokens:
            if self.has_enough:
                break
            self.new_tokens += 1
            text = self._text.put([token.id])
            if self._keep_tokens:
                own = str(self._tokenizer.decode([token.id]))
                piece.tokens.append(TokenText(token, own, self._length))
            self._length += len(text)
            self._read(self._stops.put(text), piece)
        return piece

    def end(self, outcome: Outcome) -> Piece:
        """Take how it ended; raises ApiError where it wasn't answered."""
        self.outcome = outcome
        if not self.has_enough:
            self._check(outcome)
        piece = Piece()
        if not self.has_enough:
            self._read(self._stops.put(self._text.end()) + self._stops.end(), piece)
        complete = outcome.finish is Finish.STOP or self.has_enough
        is_cut = False
        if not (self._one_call and self._called):
            reading = self._reader.end(complete=complete)
            is_cut = reading.is_cut
            self._add(reading, piece)
        self.finish_reason = "stop" if complete else "length"
        if self._called and complete and not is_cut:
            self.finish_reason = "tool_calls"
        return piece

    def _check(self, outcome: Outcome) -> None:
        if outcome.finish is Finish.CANCELLED:
            raise ApiError(503, "the server ended this request: it shuts down", code="shutdown")
        if outcome.finish is Finish.DEADLINE and not outcome.new_tokens:
            raise ApiError(
                503,
                "the request's time was over before its first token: ask again later",
                code="timeout",
                headers={"Retry-After": "5"},
            )

    def _read(self, text: str, piece: Piece) -> None:
        if text:
            self._add(self._reader.put(text), piece)

    def _add(self, reading: Reading, piece: Piece) -> None:
        if self._one_call:
            reading.calls = reading.calls[: 0 if self._called else 1]
        self._called = self._called or bool(reading.calls)
        piece.add(reading)
