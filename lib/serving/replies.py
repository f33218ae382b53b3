"""Replies in the types of OpenAI's client; each has the ``quality`` of its answer besides."""

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionMessage,
    ChatCompletionMessageFunctionToolCall,
    ChatCompletionTokenLogprob,
)
from openai.types.chat.chat_completion import Choice as ChatChoice
from openai.types.chat.chat_completion import ChoiceLogprobs
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import (
    ChoiceDelta,
    ChoiceDeltaToolCall,
    ChoiceDeltaToolCallFunction,
)
from openai.types.chat.chat_completion_chunk import ChoiceLogprobs as ChunkLogprobs
from openai.types.chat.chat_completion_message_function_tool_call import Function
from openai.types.chat.chat_completion_token_logprob import TopLogprob
from openai.types.completion_choice import Logprobs
from openai.types.completion_usage import CompletionTokensDetails, PromptTokensDetails

from ..progressive.bounds import Kind, Quality
from .choices import Choice, FinishReason, Piece, TokenText
from .tools import ToolCall

Document = dict[str, Any]
_SURE = (Kind.FULL, Kind.VERIFIED, Kind.CALIBRATED)
"""Kinds of bounds, the surest first."""


class Reply(ABC):
    """The parts of one reply: whole, or as the chunks of a stream."""

    kind: str
    """What the parts call themselves, and what ids begin with."""

    def __init__(self, model: str, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._head: dict[str, Any] = {
            "id": f"{self.kind}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    @abstractmethod
    def whole(self, choices: Sequence[Choice], pieces: Sequence[Sequence[Piece]]) -> Document:
        """Return all of it, of each choice its pieces."""

    @abstractmethod
    def chunk(self, choices: list[Document]) -> Document:
        """Return a chunk with such choices."""

    def opening(self, choice: Choice) -> Document | None:
        """Return the choice of the chunk before its first piece; None: there is none."""
        return None

    @abstractmethod
    def piece(self, choice: Choice, piece: Piece) -> Document:
        """Return the choice of a piece's chunk."""

    @abstractmethod
    def end(self, choice: Choice) -> Document:
        """Return the choice of the chunk that says why it has ended."""

    def _top(self, token: TokenText) -> list[tuple[str, float]]:
        decode = self._tokenizer.decode
        return [(str(decode([id])), _finite(logprob)) for id, logprob in token.token.top]


class ChatReply(Reply):
    """A chat completion."""

    kind = "chatcmpl"

    def __init__(self, model: str, tokenizer: Any) -> None:
        super().__init__(model, tokenizer)
        self._num_calls: dict[int, int] = {}
        """Of each choice, those that were sent."""

    def whole(self, choices: Sequence[Choice], pieces: Sequence[Sequence[Piece]]) -> Document:
        """Return a chat completion."""
        done = [
            ChatChoice(
                index=choice.index,
                finish_reason=choice.finish_reason or "stop",
                message=_message(own),
                logprobs=self._logprobs([token for piece in own for token in piece.tokens]),
                **_own_quality(choice, choices),
            )
            for choice, own in zip(choices, pieces, strict=True)
        ]
        completion = ChatCompletion(
            object="chat.completion", choices=done, usage=usage(choices), **self._head
        )
        return {**_dump(completion), "quality": quality(choices)}

    def chunk(self, choices: list[Document]) -> Document:
        """Return a chunk with such choices."""
        chunk = ChatCompletionChunk(object="chat.completion.chunk", choices=[], **self._head)
        return {**_dump(chunk), "choices": choices}

    def opening(self, choice: Choice) -> Document:
        """Return who speaks."""
        return self._choice(choice, ChoiceDelta(role="assistant", content=""))

    def piece(self, choice: Choice, piece: Piece) -> Document:
        """Return what a piece adds."""
        more: dict[str, Any] = {}
        if piece.content:
            more["content"] = piece.content
        if piece.reasoning:
            more["reasoning_content"] = piece.reasoning
        if piece.calls or piece.arguments:
            more["tool_calls"] = self._call_deltas(choice, piece)
        return self._choice(choice, ChoiceDelta(**more), logprobs=self._logprobs(piece.tokens))

    def end(self, choice: Choice) -> Document:
        """Return why a choice has ended."""
        return self._choice(choice, ChoiceDelta(), finish_reason=choice.finish_reason)

    def _call_deltas(self, choice: Choice, piece: Piece) -> list[ChoiceDeltaToolCall]:
        """Return calls with their names and ids; then more of the arguments of one that was begun
        earlier.
        """
        before = self._num_calls.get(choice.index, 0)
        self._num_calls[choice.index] = before + len(piece.calls)
        if not piece.calls:
            function = ChoiceDeltaToolCallFunction(arguments=piece.arguments)
            return [ChoiceDeltaToolCall(index=before - 1, function=function)]
        return [
            ChoiceDeltaToolCall(
                index=before + number,
                id=_call_id(),
                type="function",
                function=ChoiceDeltaToolCallFunction(name=call.name, arguments=call.arguments),
            )
            for number, call in enumerate(_calls([piece]))
        ]

    def _choice(
        self,
        choice: Choice,
        delta: ChoiceDelta,
        *,
        logprobs: ChoiceLogprobs | None = None,
        finish_reason: FinishReason | None = None,
    ) -> Document:
        own = ChunkChoice(
            index=choice.index,
            delta=delta,
            logprobs=None if logprobs is None else ChunkLogprobs(**_dump(logprobs)),
            finish_reason=finish_reason,
        )
        return _dump(own)

    def _logprobs(self, tokens: Sequence[TokenText]) -> ChoiceLogprobs | None:
        if not tokens:
            return None
        content = [
            ChatCompletionTokenLogprob(
                token=each.text,
                bytes=_bytes(each.text),
                logprob=_finite(each.token.logprob),
                top_logprobs=[
                    TopLogprob(token=text, bytes=_bytes(text), logprob=logprob)
                    for text, logprob in self._top(each)
                ],
            )
            for each in tokens
        ]
        return ChoiceLogprobs(content=content, refusal=None)


class TextReply(Reply):
    """A completion, the older form."""

    kind = "cmpl"

    def whole(self, choices: Sequence[Choice], pieces: Sequence[Sequence[Piece]]) -> Document:
        """Return a completion."""
        done = [
            self._choice(choice, own, choice.finish_reason) | _own_quality(choice, choices)
            for choice, own in zip(choices, pieces, strict=True)
        ]
        return {**self.chunk(done), "usage": _dump(usage(choices)), "quality": quality(choices)}

    def chunk(self, choices: list[Document]) -> Document:
        """Return a completion with such choices, which chunks are, too."""
        completion = Completion(object="text_completion", choices=[], **self._head)
        return {**_dump(completion), "choices": choices}

    def piece(self, choice: Choice, piece: Piece) -> Document:
        """Return what a piece adds."""
        return self._choice(choice, [piece], None)

    def end(self, choice: Choice) -> Document:
        """Return why a choice has ended."""
        return self._choice(choice, [], choice.finish_reason)

    def _choice(
        self, choice: Choice, pieces: Sequence[Piece], finish_reason: FinishReason | None
    ) -> Document:
        """Return a choice; OpenAI's type has no finish_reason of null, which its chunks have."""
        tokens = [token for piece in pieces for token in piece.tokens]
        logprobs = Logprobs(
            tokens=[each.text for each in tokens],
            token_logprobs=[_finite(each.token.logprob) for each in tokens],
            top_logprobs=[dict(self._top(each)) for each in tokens],
            text_offset=[each.offset for each in tokens],
        )
        own = CompletionChoice(
            index=choice.index,
            text="".join(piece.content for piece in pieces),
            finish_reason="stop",
            logprobs=logprobs if tokens else None,
        )
        return {**_dump(own), "finish_reason": finish_reason}


def usage(choices: Sequence[Choice]) -> CompletionUsage:
    """Return what a request took. The details: of the prompts, what earlier requests had computed;
    of the drafted tokens, those that are in the answers and those that were taken back.
    """
    prompts = {choice.prompt_number: choice.prompt_tokens for choice in choices}
    cached = dict(prompts)
    accepted = rejected = 0
    for choice in choices:
        number, outcome = choice.prompt_number, choice.outcome
        cached[number] = min(cached[number], outcome.cached_tokens if outcome else 0)
        if outcome is not None:
            accepted += min(outcome.accepted_tokens, choice.new_tokens)
            rejected += outcome.rejected_tokens
    prompt, new = sum(prompts.values()), sum(choice.new_tokens for choice in choices)
    return CompletionUsage(
        prompt_tokens=prompt,
        completion_tokens=new,
        total_tokens=prompt + new,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(cached.values())),
        completion_tokens_details=CompletionTokensDetails(
            accepted_prediction_tokens=accepted, rejected_prediction_tokens=rejected
        ),
    )


def quality(choices: Sequence[Choice]) -> Document | None:
    """Return what the answers of a request are known to have, together: the largest bound, the
    least sure kind, the sum of the chances and of the bytes.
    """
    each = [choice.outcome.quality for choice in choices if choice.outcome is not None]
    if not each:
        return None
    worst = max(each, key=lambda own: (own.bound, _SURE.index(own.kind)))
    together = Quality(
        tier=worst.tier,
        bound=worst.bound,
        metric=worst.metric,
        kind=max((own.kind for own in each), key=_SURE.index),
        delta=min(1.0, sum(own.delta for own in each)),
        escalations=sum(own.escalations for own in each),
        kv_bytes=sum(own.kv_bytes for own in each),
        total_bytes=sum(own.total_bytes for own in each),
    )
    return asdict(together)


def _own_quality(choice: Choice, choices: Sequence[Choice]) -> Document:
    """Of several choices, each has its own quality."""
    return {"quality": quality([choice])} if len(choices) > 1 else {}


def _message(pieces: Sequence[Piece]) -> ChatCompletionMessage:
    content = "".join(piece.content for piece in pieces)
    calls = [_message_call(call) for call in _calls(pieces)]
    reasoning = "".join(piece.reasoning for piece in pieces)
    more: Mapping[str, Any] = {
        **({"tool_calls": calls} if calls else {}),
        **({"reasoning_content": reasoning} if reasoning else {}),
    }
    return ChatCompletionMessage(
        role="assistant",
        content=content if content or not calls else None,
        refusal=None,
        annotations=[],
        **more,
    )


def _calls(pieces: Sequence[Piece]) -> list[ToolCall]:
    """Return the calls of pieces with all of their arguments."""
    calls: list[ToolCall] = []
    for piece in pieces:
        calls += piece.calls
        if piece.arguments:
            calls[-1] = ToolCall(calls[-1].name, calls[-1].arguments + piece.arguments)
    return calls


def _message_call(call: ToolCall) -> ChatCompletionMessageFunctionToolCall:
    function = Function(name=call.name, arguments=call.arguments)
    return ChatCompletionMessageFunctionToolCall(id=_call_id(), type="function", function=function)


def _call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _bytes(text: str) -> list[int] | None:
    """Return the bytes of a token's text; None where it is a part of a character."""
    return None if "\ufffd" in text else list(text.encode())


def _finite(logprob: float) -> float:
    """Return a log-probability as JSON can say it: OpenAI's value for what is out of question."""
    return max(logprob, -9999.0)


def _dump(document: Any) -> Document:
    """Return what was set of a record."""
    return dict(document.model_dump(mode="json", exclude_unset=True))
