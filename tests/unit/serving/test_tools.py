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


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
class TestCallReader:
    ARGUMENTS = ('{"a":1}', "{}", '{"a":{"b":"}}"},"c":[{}]}')

    def read(self, text: str, size: int, *, complete: bool = True) -> tuple[Reading, list[str]]:
        """Return all that was read, and the arguments as they came."""
        reader, whole, fragments = CallReader(), Reading(), []
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        for reading in [*map(reader.put, pieces), reader.end(complete=complete)]:
            whole.content += reading.content
            whole.calls += reading.calls
            whole.arguments += reading.arguments
            whole.is_cut |= reading.is_cut
            fragments += [reading.arguments] if reading.arguments else []
        return whole, fragments

    @pytest.mark.parametrize("arguments", ARGUMENTS)
    def test_arguments_come_as_they_are_written(self, size: int, arguments: str) -> None:
        whole, fragments = self.read(f'{{"name":"add","arguments":{arguments}}}', size)
        assert whole == Reading(calls=[ToolCall("add", "")], arguments=arguments)
        assert all(len(each) <= size + 1 for each in fragments)

    @pytest.mark.parametrize("arguments", ARGUMENTS)
    def test_one_that_is_cut_off_says_so(self, size: int, arguments: str) -> None:
        for complete in (False, True):  # by the limit, or by a stop text
            for end in range(len(arguments)):
                text = f'{{"name":"add","arguments":{arguments[:end]}'
                whole, _ = self.read(text, size, complete=complete)
                assert whole.calls == [ToolCall("add", "")] and whole.is_cut
                assert whole.arguments == arguments[:end]

    def test_without_a_name_there_is_no_call(self, size: int) -> None:
        text = '{"name":"add","argum'
        assert self.read(text, size, complete=False)[0] == Reading(text)
