"""Requests to tokens: chat templates, and limits of length."""

import json
from collections.abc import Sequence
from typing import Any

from ..progressive.bounds import RequestError
from .bodies import ChatBody, Message
from .tools import Document, told_of_tools

_PROBE_TOOL: Document = {
    "type": "function",
    "function": {"name": "f", "description": "", "parameters": {"type": "object"}},
}


class Prompts:
    """Makes prompts with one tokenizer, which one thread at a time may use."""

    def __init__(self, tokenizer: Any, *, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._has_chat = getattr(tokenizer, "chat_template", None) is not None
        self._renders_tools = self._has_chat and self._probe()

    def chat(self, body: ChatBody) -> list[int]:
        """Return the tokens of a chat; raises RequestError."""
        if not self._has_chat:
            raise RequestError(
                "the model has no chat template: it wasn't made for chats; continue a text with "
                "/v1/completions",
                param="messages",
            )
        messages = [_message(message) for message in body.messages]
        tools = [_tool(tool.model_dump(exclude_none=True)) for tool in body.active_tools]
        if not self._renders_tools:
            messages = told_of_tools(messages, tools)
            tools = []
        return self._render(messages, tools)

    def text(self, prompt: str | Sequence[int]) -> list[int]:
        """Return the tokens of a text to continue; raises RequestError."""
        if isinstance(prompt, str):
            ids = [int(token) for token in self._tokenizer(prompt)["input_ids"]]
            if not ids:
                raise RequestError("prompt makes no token: give some text", param="prompt")
            return ids
        if max(prompt) >= self._vocab_size:
            raise RequestError(
                f"prompt has the token {max(prompt)}: the model's are 0 to {self._vocab_size - 1}",
                param="prompt",
            )
        return list(prompt)

    def _render(self, messages: Sequence[Document], tools: Sequence[Document]) -> list[int]:
        from jinja2 import TemplateError

        try:
            encoded = self._tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) or None,
                add_generation_prompt=True,
                return_dict=True,
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise RequestError(
                f"the model's chat template refuses these messages ({error})", param="messages"
            ) from error
        return [int(token) for token in encoded["input_ids"]]

    def _probe(self) -> bool:
        """Return whether the chat template says which tools there are."""
        messages = [{"role": "user", "content": "x"}]
        try:
            return self._render(messages, [_PROBE_TOOL]) != self._render(messages, [])
        except RequestError:
            return False


def _message(message: Message) -> Document:
    document: Document = {"role": message.role, "content": message.text()}
    if message.role == "developer":  # what OpenAI calls the system message now
        document["role"] = "system"
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, name)) is not None:
            document[name] = value
    if message.tool_calls:
        document["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": _arguments(call.function.arguments),
                },
            }
            for call in message.tool_calls
        ]
    return document


def _arguments(text: str) -> Any:
    """Return arguments as an object, which templates go through."""
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise RequestError(
            "messages has tool_calls whose arguments are not a JSON object: give one as text",
            param="messages",
        )
    return arguments


def _tool(document: Document) -> Document:
    """Return a tool as templates expect one: with all its fields."""
    function = document["function"]
    return {
        "type": "function",
        "function": {
            "name": function["name"],
            "description": function.get("description", ""),
            "parameters": function.get("parameters", {"type": "object", "properties": {}}),
        },
    }
