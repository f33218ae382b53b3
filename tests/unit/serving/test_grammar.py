"""Answers that keep a grammar, whatever the model would say."""

import json
from typing import Any

import jsonschema
import pytest
from fastapi.testclient import TestClient

from lib.progressive.bounds import RequestError

pytest.importorskip("llguidance")

from lib.serving.grammar import Grammars

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"$ref": "#/$defs/age"}},
    "required": ["name", "age"],
    "$defs": {"age": {"type": "integer", "minimum": 3, "maximum": 99}},
}
TOOLS = [
    {"type": "function", "function": {"name": "greet", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "stop"}},
]
MESSAGES = [{"role": "user", "content": "go"}]


@pytest.fixture(scope="module")
def grammars(tokenizer: Any) -> Grammars:
    return Grammars(tokenizer, vocab_size=300, stop_ids=[tokenizer.eos_token_id])


def test_masks_follow_an_answer_and_go_back_with_it(grammars: Grammars, tokenizer: Any) -> None:
    allowed = grammars.json(SCHEMA, param="response_format")
    ids = tokenizer('{"name":"Bob","age":12}')["input_ids"]
    for end in (0, 3, len(ids) - 1, 5, 2, len(ids) - 1):
        mask = allowed(ids[:end])
        assert mask.shape == (300,) and mask[ids[end]], end
        assert not mask[tokenizer.eos_token_id]
    assert allowed(ids).nonzero().flatten().tolist() == [tokenizer.eos_token_id]
    assert not allowed([])[ids[1]]


@pytest.mark.parametrize(
    "schema", [{"type": "objec"}, {"not": {"type": "string"}}, {"$ref": "#/x"}]
)
def test_a_schema_that_cant_be_kept_is_refused(grammars: Grammars, schema: Any) -> None:
    with pytest.raises(RequestError, match="simplify it") as caught:
        grammars.json(schema, param="response_format")
    assert caught.value.param == "response_format"


def ask(client: TestClient, **fields: Any) -> Any:
    body = {"model": "tiny", "messages": MESSAGES, "temperature": 1.5, **fields}
    reply = client.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"]


def test_a_tool_that_must_be_called_is(client: TestClient) -> None:
    for choice in ask(client, tools=TOOLS, tool_choice="required", n=4, seed=1):
        assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
        (call,) = choice["message"]["tool_calls"]
        arguments = json.loads(call["function"]["arguments"])
        if call["function"]["name"] == "greet":
            jsonschema.validate(arguments, SCHEMA)
        else:
            assert (call["function"]["name"], arguments) == ("stop", {})


def test_a_named_tool_is_called(client: TestClient) -> None:
    named = {"type": "function", "function": {"name": "stop"}}
    (choice,) = ask(client, tools=TOOLS, tool_choice=named)
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "stop", "arguments": "{}"}


def test_json_keeps_its_schema(client: TestClient) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    for choice in ask(client, response_format=form, n=3, seed=2):
        jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)


def test_one_that_is_cut_off_has_no_call(client: TestClient) -> None:
    (choice,) = ask(client, tools=TOOLS, tool_choice="required", max_tokens=4)
    assert choice["finish_reason"] == "length" and "tool_calls" not in choice["message"]


def streamed(client: TestClient, **fields: Any) -> tuple[list[dict[str, Any]], str]:
    """Return the deltas of calls, and why it ended."""
    body = {"model": "tiny", "messages": MESSAGES, "temperature": 1.5, "stream": True, **fields}
    *events, _, _ = client.post("/v1/chat/completions", json=body).text.split("\n\n")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    deltas = [each for choice in choices for each in choice["delta"].get("tool_calls", ())]
    return deltas, choices[-1]["finish_reason"]


def test_a_calls_arguments_are_streamed_as_they_are_written(client: TestClient) -> None:
    for seed in range(4):
        how: dict[str, Any] = {"tools": TOOLS[:1], "tool_choice": "required", "seed": seed}
        (choice,) = ask(client, **how)
        (call,) = choice["message"]["tool_calls"]
        (first, *others), finish = streamed(client, **how)
        assert finish == "tool_calls" and len(others) > 5
        assert first["type"] == "function" and first["id"].startswith("call_")
        assert all(each.keys() == {"index", "function"} and each["index"] == 0 for each in others)
        assert first["function"]["name"] == call["function"]["name"]
        assert all(each["function"].keys() == {"arguments"} for each in others)
        arguments = "".join(each["function"]["arguments"] for each in (first, *others))
        assert arguments == call["function"]["arguments"]


@pytest.mark.parametrize(
    ("more", "finish"), [({"max_tokens": 32}, "length"), ({"stop": "age"}, "stop")]
)
def test_a_call_that_is_cut_off_has_the_arguments_so_far(
    client: TestClient, more: dict[str, Any], finish: str
) -> None:
    how: dict[str, Any] = {"tools": TOOLS[:1], "tool_choice": "required", "seed": 3, **more}
    (choice,) = ask(client, **how)
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == finish
    assert '{"name":'.startswith(call["function"]["arguments"][:8])
    deltas, ended = streamed(client, **how)
    assert ended == finish
    arguments = "".join(each["function"]["arguments"] for each in deltas)
    assert arguments == call["function"]["arguments"]
