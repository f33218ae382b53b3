"""Calls are told from content, wherever the text is cut."""

from typing import Any

import pytest

from lib.serving.tools import HERMES, CallReader, Reading, TemplateReader, ToolCall

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


def read(tokenizer: Any, text: str, *, size: int) -> Reading:
    reader = TemplateReader(tokenizer, HERMES, prompt=[1], tools=TOOLS)
    whole = Reading()
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    for reading in [*map(reader.put, pieces), reader.end(complete=True)]:
        whole.content += reading.content
        whole.calls += reading.calls
    return whole


@pytest.mark.parametrize("size", [1, 3, 1000])
class TestTemplateReader:
    def test_content_before_calls(self, tokenizer: Any, size: int) -> None:
        found = read(tokenizer, f"I will.\n{CALL}\n{CALL}", size=size)
        assert found.content == "I will."
        assert found.calls == [ToolCall("add", '{"a": 1}')] * 2

    def test_what_only_looks_like_a_call_is_content(self, tokenizer: Any, size: int) -> None:
        for text in ("a < b", "<tool_box>", "1 <tool_"):
            assert read(tokenizer, text, size=size) == Reading(text)

    def test_a_call_that_is_no_json_is_content(self, tokenizer: Any, size: int) -> None:
        found = read(tokenizer, "so <tool_call>{nonsense</tool_call> end", size=size)
        assert "nonsense" in found.content and found.content.endswith("end") and not found.calls

    def test_a_tool_that_isnt_there_is_content(self, tokenizer: Any, size: int) -> None:
        found = read(tokenizer, CALL.replace("add", "drop"), size=size)
        assert '"drop"' in found.content and not found.calls


def test_a_call_that_was_cut_off_is_content() -> None:
    reader = CallReader()
    reader.put('{"name":"add","argum')
    assert reader.end(complete=False) == Reading('{"name":"add","argum')
