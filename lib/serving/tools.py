"""Tool calls in the text of a model: how it is told of tools, and how its calls are read.

Models whose chat template renders tools are told by it; the others by a system message in the form
that Hermes models were trained with, ``<tool_call>{"name": ..., "arguments": ...}</tool_call>``.
Calls are read by transformers' parser, from the form that the model's tokenizer declares.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

HERMES: Mapping[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"content": "text"},
    },
}
"""The form as transformers' parser takes it."""
_INSTRUCTIONS = """You may call functions to answer. These are they, as JSON:
<tools>
{tools}
</tools>
To call one, answer with its name and arguments as JSON, and nothing else:
<tool_call>
{{"name": <function-name>, "arguments": <arguments-object>}}
</tool_call>"""
_OPENING = re.compile(r'\s*\{"name":("[a-zA-Z0-9_-]+"),"arguments":')
"""Of a call, as its grammar has it."""
Document = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that was read: its arguments as JSON text."""

    name: str
    arguments: str


@dataclass(slots=True)
class Reading:
    """What text was found to be."""

    content: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    arguments: str = ""
    """More of the arguments of the last call, of this reading or an earlier one."""
    is_cut: bool = False
    """Whether the last call's arguments are none that could be read: the answer was cut off."""


class Reader(Protocol):
    """Tells content from calls while the text comes."""

    def put(self, text: str) -> Reading:
        """Take a piece of text."""

    def end(self, *, complete: bool) -> Reading:
        """Return what was held back; ``complete``: the answer was not cut off."""


class PlainReader:
    """Everything is content."""

    def put(self, text: str) -> Reading:
        """Take a piece of text."""
        return Reading(text)

    def end(self, *, complete: bool) -> Reading:
        """Return nothing: nothing was held back."""
        return Reading()


class CallReader:
    """The text is one call, since a grammar holds it to that (``Grammars.call``): as soon as its
    name is there, its arguments are passed on as they come. One without a name is content.
    """

    def __init__(self) -> None:
        self._text = ""
        self._shown: int | None = None
        """How much of the text was passed on; None: its name isn't there yet."""

    def put(self, text: str) -> Reading:
        """Take a piece of text."""
        self._text += text
        reading = Reading()
        if self._shown is None:
            opening = _OPENING.match(self._text)
            if opening is None:
                return reading
            self._shown = opening.end()
            reading.calls.append(ToolCall(json.loads(opening[1]), ""))
        end = len(self._text.removesuffix("}"))  # it may be the call's own brace
        reading.arguments = self._text[self._shown : max(end, self._shown)]
        self._shown += len(reading.arguments)
        return reading

    def end(self, *, complete: bool) -> Reading:
        """Return what was held back."""
        if self._shown is None:
            return Reading(self._text)
        try:
            json.loads(self._text)
        except ValueError:
            return Reading(arguments=self._text[self._shown :], is_cut=True)
        return Reading()


class TemplateReader:
    """Content and calls by a response template of transformers; what is no call of a tool that
    there is stays content.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: Mapping[str, Any],
        *,
        prompt: Sequence[int],
        tools: Sequence[Document],
    ) -> None:
        # What a template's generation prompt has begun is a part of the answer; the form of our own
        # begins nothing, and its instructions show what a call looks like.
        prefix = "" if template is HERMES else tokenizer.decode(list(prompt))
        self._parser = tokenizer.get_response_parser(
            dict(template), prefix=prefix, tools=list(tools) or None
        )
        self._names = {tool["function"]["name"] for tool in tools}
        self._unread = ""
        """The text of a call that is not closed yet."""
        self._failed = False

    def put(self, text: str) -> Reading:
        """Take a piece of text."""
        if self._failed:
            return Reading(text)
        try:
            return self._read(self._parser.feed(text))
        except ValueError:  # a call that is not JSON
            return self._give_up(text)

    def end(self, *, complete: bool) -> Reading:
        """Return what was held back."""
        if self._failed:
            return Reading()
        try:
            _, events = self._parser.finalize()
        except ValueError:
            return self._give_up("")
        return self._read(events)

    def _read(self, events: Sequence[Mapping[str, Any]]) -> Reading:
        reading = Reading()
        for event in events:
            kind, part = event["type"], event["field"]
            if kind == "region_chunk" and event["dirty"]:
                self._unread += event["text"]
            elif kind == "region_chunk" and part == "content":
                reading.content += event["text"]
            elif kind == "region_chunk":
                reading.reasoning += event["text"]
            elif kind == "region_close" and part == "tool_calls":
                value, text = event["value"], self._unread
                self._unread = ""
                try:
                    call = _tool_call(value["function"])
                except (KeyError, TypeError):
                    call = None
                if call is not None and call.name in self._names:
                    reading.calls.append(call)
                else:
                    reading.content += text
        return reading

    def _give_up(self, text: str) -> Reading:
        self._failed = True
        return Reading(self._unread + text)


def _tool_call(function: Mapping[str, Any]) -> ToolCall:
    arguments = function["arguments"]
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return ToolCall(str(function["name"]), arguments)


def told_of_tools(messages: Sequence[Document], tools: Sequence[Document]) -> list[Document]:
    """Return messages for a template that knows no tools: the system message says which there are,
    calls and their results are text.
    """
    said = [_as_text(message) for message in messages]
    if not tools:
        return said
    lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    instructions = _INSTRUCTIONS.format(tools=lines)
    if said[0]["role"] == "system":
        return [{**said[0], "content": f"{said[0]['content']}\n\n{instructions}"}, *said[1:]]
    return [{"role": "system", "content": instructions}, *said]


def _as_text(message: Document) -> Document:
    if message["role"] == "tool":
        return {
            "role": "user",
            "content": f"<tool_response>\n{message['content']}\n</tool_response>",
        }
    calls = [
        f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>"
        for call in message.get("tool_calls", ())
    ]
    content = "\n".join(filter(None, [message["content"], *calls]))
    return {"role": message["role"], "content": content}
