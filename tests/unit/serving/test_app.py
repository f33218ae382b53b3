"""The endpoint: what it answers, streamed and not, what it refuses, and that it goes on."""

import json
from typing import Any

import anyio
import pytest
from fastapi.testclient import TestClient
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from lib.errors import InputError
from lib.progressive.bounds import Metric, QualityBound
from lib.progressive.generation import GenerationRequest
from lib.serving.app import make_app
from lib.serving.gate import Gate
from lib.serving.settings import ModelCard, Settings
from tests.plain_engine import PlainEngine
from tests.unit.serving.conftest import ANSWER, Endpoint

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
MESSAGES = [{"role": "user", "content": "go"}]


def ask(client: TestClient, **fields: Any) -> dict[str, Any]:
    reply = client.post(CHAT, json={"model": "tiny", "messages": MESSAGES, **fields})
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def refused(client: TestClient, status: int, path: str = CHAT, **fields: Any) -> dict[str, Any]:
    default = {"messages": MESSAGES} if path == CHAT else {"prompt": ">"}
    reply = client.post(path, json={"model": "tiny", **default, **fields})
    assert reply.status_code == status, reply.text
    document = reply.json()
    assert set(document) == {"error"}
    assert set(document["error"]) == {"message", "type", "param", "code"}
    return dict(document["error"])


def stream(client: TestClient, path: str = CHAT, **fields: Any) -> list[Any]:
    default = {"messages": MESSAGES} if path == CHAT else {"prompt": ">"}
    reply = client.post(path, json={"model": "tiny", "stream": True, **default, **fields})
    assert reply.headers["content-type"].startswith("text/event-stream"), reply.text
    *events, done, end = reply.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def text_of(chunks: list[Any]) -> str:
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    return "".join(delta.get("content", "") for delta in deltas)


class TestAnswers:
    def test_a_chat_is_answered_with_what_it_used_and_its_quality(self, client: TestClient) -> None:
        reply = ask(client)
        ChatCompletion.model_validate(reply)
        (choice,) = reply["choices"]
        assert choice["message"]["content"] == ANSWER
        assert choice["finish_reason"] == "stop"
        assert reply["usage"]["completion_tokens"] == len(ANSWER.encode())
        assert reply["quality"]["kind"] == "full" and reply["quality"]["kv_bytes"] > 0
        assert reply["id"].startswith("chatcmpl-")

    @pytest.mark.parametrize("with_usage", [False, True])
    def test_a_stream_gives_the_same_and_ends_with_its_quality(
        self, client: TestClient, with_usage: bool
    ) -> None:
        options = {"stream_options": {"include_usage": True}} if with_usage else {}
        chunks = stream(client, **options)
        for chunk in chunks:
            ChatCompletionChunk.model_validate(chunk)
        assert text_of(chunks) == ANSWER
        assert not [chunk for chunk in chunks if "\ufffd" in json.dumps(chunk)]
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert ["quality" in chunk for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        if with_usage:
            assert chunks[-1]["choices"] == []
            assert chunks[-1]["usage"]["completion_tokens"] == len(ANSWER.encode())
            assert all(chunk["usage"] is None for chunk in chunks[:-1])

    def test_a_limit_of_tokens_is_length(self, client: TestClient) -> None:
        for name in ("max_tokens", "max_completion_tokens"):
            (choice,) = ask(client, **{name: 3})["choices"]
            assert (choice["message"]["content"], choice["finish_reason"]) == ("abc", "length")

    @pytest.mark.parametrize(
        ("stop", "left"), [("def", "abc"), (["xyz~q", "ij"], "abcdefgh"), ("\u00e9", ANSWER[:-2])]
    )
    def test_it_ends_before_a_stop_text(self, client: TestClient, stop: Any, left: str) -> None:
        (choice,) = ask(client, stop=stop)["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (left, "stop")
        assert text_of(stream(client, stop=stop)) == left

    def test_what_only_begins_like_a_stop_text_is_shown(self, client: TestClient) -> None:
        assert text_of(stream(client, stop="!x")) == ANSWER

    def test_a_seed_repeats_its_samples_and_choices_differ(self, client: TestClient) -> None:
        how = {"n": 3, "temperature": 2, "seed": 5, "max_tokens": 12}
        once, again = (
            [choice["message"]["content"] for choice in ask(client, **how)["choices"]]
            for _ in range(2)
        )
        assert once == again and len(set(once)) == 3
        assert all("quality" in choice for choice in ask(client, **how)["choices"])

    def test_logprobs_of_a_chat(self, client: TestClient) -> None:
        (choice,) = ask(client, logprobs=True, top_logprobs=2, max_tokens=2)["choices"]
        first, _ = choice["logprobs"]["content"]
        assert (first["token"], first["bytes"]) == ("a", [97])
        assert len(first["top_logprobs"]) == 2 and first["top_logprobs"][0]["token"] == "a"
        chunks = stream(client, logprobs=True, max_tokens=2)
        found = [chunk["choices"][0]["logprobs"] for chunk in chunks]
        assert [each["content"][0]["token"] for each in found if each] == ["a", "b"]

    def test_several_texts_are_continued(self, client: TestClient, tokenizer: Any) -> None:
        prompts: list[Any] = [tokenizer("p")["input_ids"], tokenizer("c")["input_ids"]]
        for given in (["p", "c"], prompts):
            body = {"model": "tiny", "prompt": given, "max_tokens": 3, "n": 2, "logprobs": 1}
            reply = client.post(TEXT, json=body).json()
            Completion.model_validate(reply)
            assert [choice["text"] for choice in reply["choices"]] == ["qrs"] * 2 + ["def"] * 2
            assert reply["usage"]["prompt_tokens"] == 2
            assert reply["choices"][0]["logprobs"]["text_offset"] == [0, 1, 2]

    def test_a_streamed_text(self, client: TestClient) -> None:
        chunks = stream(client, TEXT, max_tokens=4)
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "abcd"
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"

    def test_a_developer_is_the_system_and_tools_are_told_of(
        self, client: TestClient, engine: PlainEngine, tokenizer: Any
    ) -> None:
        asked: list[GenerationRequest] = []
        submit = engine.submit
        engine.submit = lambda request, on: (asked.append(request), submit(request, on))[1]  # type: ignore[method-assign]
        tool = {"type": "function", "function": {"name": "add", "description": "sums"}}
        developer = {"role": "developer", "content": [{"type": "text", "text": "be kind"}]}
        ask(client, messages=[developer, *MESSAGES], tools=[tool])
        prompt = tokenizer.decode(asked[0].prompt)
        assert prompt.startswith("<system>be kind") and '"name": "add"' in prompt
        call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
        result = {"role": "tool", "tool_call_id": "1", "content": "7"}
        ask(client, messages=[*MESSAGES, {"role": "assistant", "tool_calls": [call]}, result])
        prompt = tokenizer.decode(asked[1].prompt)
        assert "<tool_call>" in prompt and "<tool_response>\n7\n</tool_response>" in prompt


class TestBounds:
    @pytest.mark.parametrize(
        ("given", "bound"),
        [
            (None, None),
            (0.05, QualityBound(epsilon=0.05)),
            ({"metric": "exact"}, QualityBound(metric=Metric.EXACT)),
            ({"epsilon": 1}, QualityBound(epsilon=1.0)),
        ],
    )
    def test_a_bound_reaches_the_engine(
        self, client: TestClient, engine: PlainEngine, given: Any, bound: QualityBound | None
    ) -> None:
        seen: list[QualityBound | None] = []
        engine.check = lambda request: seen.append(request.bound)  # type: ignore[method-assign]
        ask(client, quality_bound=given)
        assert seen[0] == bound

    def test_one_without_a_calibration_is_refused(self, client: TestClient) -> None:
        error = refused(client, 400, quality_bound={"epsilon": 0.05, "delta": 0.05})
        assert (error["param"], error["code"]) == ("quality_bound", "no_calibration")

    def test_the_default_holds_where_none_is_given(
        self, endpoint: Endpoint, engine: PlainEngine
    ) -> None:
        seen: list[QualityBound | None] = []
        engine.check = lambda request: seen.append(request.bound)  # type: ignore[method-assign]
        ask(endpoint(default_bound=QualityBound(epsilon=0.2)))
        assert seen[0] == QualityBound(epsilon=0.2)


BAD: list[tuple[dict[str, Any], str | None]] = [
    ({"quality_bound": -0.1}, "quality_bound"),
    ({"quality_bound": "0.1"}, "quality_bound"),
    ({"quality_bound": {"epsilon": 0.1, "metric": "tv"}}, "quality_bound"),
    ({"quality_bound": {"delta": 0.1}}, "quality_bound"),
    ({"quality_bound": {"epsilon": 0.1, "metric": "exact"}}, "quality_bound"),
    ({"quality_bound": {"epsilon": 0.1, "delta": 1}}, "quality_bound"),
    ({"temperature": 3}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"n": 0}, "n"),
    ({"n": 9}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 5000}, "messages"),
    ({"max_tokens": 1900}, "max_tokens"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, None),
    ({"stop": [""]}, None),
    ({"stop": ["a"] * 17}, "stop"),
    ({"top_logprobs": 2}, None),
    ({"stream_options": {"include_usage": True}}, None),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages"),
    ({"messages": [{"role": "robot", "content": "a"}]}, "messages"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": "a" * 3000}]}, "messages"),
    ({"tool_choice": "required"}, None),
    ({"logit_bias": {"1": 1}}, "logit_bias"),
    ({"frequency_penalty": 0.1}, "frequency_penalty"),
    ({"presence_penalty": -1}, "presence_penalty"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"store": True}, "store"),
    ({"audio": {}}, "audio"),
    ({"functions": []}, "functions"),
    ({"reasoning_effort": "low"}, "reasoning_effort"),
    ({"something": 1}, "something"),
]


class TestRefusals:
    @pytest.mark.parametrize(("fields", "param"), BAD, ids=lambda value: str(value)[:40])
    def test_a_bad_field_is_named_and_the_server_goes_on(
        self, endpoint: Endpoint, fields: dict[str, Any], param: str | None
    ) -> None:
        client = endpoint(max_new_tokens=1800)
        content = json.dumps({"model": "tiny", "messages": MESSAGES, **fields})
        reply = client.post(CHAT, content=content, headers={"Content-Type": "application/json"})
        error = reply.json()["error"]
        assert reply.status_code == 400 and error["param"] == param, reply.text
        assert error["type"] == "invalid_request_error"
        assert ask(client, max_tokens=1)["usage"]["completion_tokens"] == 1

    @pytest.mark.parametrize(
        "content",
        [b"", b"{", b"[]", b'"a"', b"\xff\xfe", b"[" * 50_000, b'{"model": NaN}', b"1" * 5000],
        ids=lambda content: str(content[:8]),
    )
    def test_what_is_no_body_is_refused(self, client: TestClient, content: bytes) -> None:
        reply = client.post(CHAT, content=content, headers={"Content-Type": "application/json"})
        assert reply.status_code == 400 and reply.json()["error"]["message"]

    def test_nan_is_no_bound(self, client: TestClient) -> None:
        content = '{"model": "tiny", "prompt": "a", "quality_bound": NaN}'
        reply = client.post(TEXT, content=content, headers={"Content-Type": "application/json"})
        assert reply.status_code == 400 and reply.json()["error"]["param"] == "quality_bound"

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"prompt": ""}, "prompt"),
            ({"prompt": [300]}, "prompt"),
            ({"prompt": []}, "prompt"),
            ({"echo": True}, "echo"),
            ({"suffix": "a"}, "suffix"),
            ({"best_of": 2}, "best_of"),
            ({"prompt": ["a"] * 9}, "n"),
        ],
    )
    def test_texts_that_cant_be_continued(
        self, client: TestClient, fields: dict[str, Any], param: str
    ) -> None:
        assert refused(client, 400, TEXT, **fields)["param"] == param

    def test_an_unknown_model_and_unknown_places(self, client: TestClient) -> None:
        assert refused(client, 404, model="other")["code"] == "model_not_found"
        for method, path, status in (
            ("GET", "/v1/models/other", 404),
            ("GET", "/v1/nothing", 404),
            ("GET", "/nothing", 404),
            ("DELETE", "/v1/models", 405),
        ):
            reply = client.request(method, path)
            assert reply.status_code == status and "error" in reply.json()

    def test_a_body_that_is_too_large(self, endpoint: Endpoint) -> None:
        client = endpoint(max_body_bytes=10_000)
        parts = (b" " * 1000 for _ in range(11))
        for content in (b" " * 10_001, parts):
            reply = client.post(CHAT, content=content)
            assert reply.status_code == 413
            assert reply.json()["error"]["code"] == "body_too_large"

    def test_a_key_is_asked_for(self, endpoint: Endpoint) -> None:
        client = endpoint(api_key="secret")
        for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "secret"}):
            reply = client.get("/v1/models", headers=headers)
            assert reply.status_code == 401
            assert reply.json()["error"]["code"] == "invalid_api_key"
        assert client.get("/v1/models", headers={"Authorization": "Bearer secret"}).is_success
        assert client.get("/health").is_success

    def test_a_full_queue_is_429_and_none_of_its_choices_stays(
        self, model: Any, tokenizer: Any
    ) -> None:
        engine = PlainEngine(model, max_queue=1)
        card = ModelCard(name="tiny", vocab_size=258, stop_ids=frozenset({257}))
        client = TestClient(make_app(engine, tokenizer, Settings(model=card)))
        assert refused(client, 429, n=2)["code"] == "queue_full"
        reply = client.post(CHAT, json={"model": "tiny", "messages": MESSAGES, "n": 2})
        assert int(reply.headers["Retry-After"]) > 0
        assert engine.wait_until_idle(10)
        engine.close()


class TestFailures:
    def test_a_failure_of_the_engine_is_500_and_the_next_is_answered(
        self, client: TestClient, engine: PlainEngine
    ) -> None:
        engine.broken = OSError("a page can't be read")
        assert "a page can't be read" in refused(client, 500)["message"]
        engine.broken = InputError("errors of keys add up to nan")  # what was asked is right
        error = refused(client, 500)
        assert (error["type"], error["code"]) == ("server_error", "engine_failure")
        assert "add up to nan" in error["message"]
        engine.broken = RuntimeError("hush")
        assert "hush" not in refused(client, 500)["message"]
        engine.broken = None
        assert ask(client)["usage"]["completion_tokens"]

    def test_one_in_a_stream_is_its_last_event(
        self, client: TestClient, engine: PlainEngine
    ) -> None:
        engine.broken = OSError("a page can't be read")
        *_, last = stream(client)
        assert last["error"]["type"] == "server_error"

    def test_what_is_late_is_ended(self, endpoint: Endpoint) -> None:
        assert refused(endpoint(max_seconds=-1.0), 503)["code"] == "timeout"

    def test_a_server_that_drains_takes_nothing_new(self, client: TestClient) -> None:
        gate = client.app
        assert isinstance(gate, Gate)
        gate.draining = True
        assert refused(client, 503)["code"] == "shutdown"
        assert client.get("/health").json() == {"status": "draining"}

    @pytest.mark.parametrize("streamed", [False, True])
    def test_who_goes_is_not_answered_any_more(
        self, endpoint: Endpoint, engine: PlainEngine, streamed: bool
    ) -> None:
        client = endpoint()
        engine.paused.clear()
        body = json.dumps({"model": "tiny", "messages": MESSAGES, "stream": streamed}).encode()
        events = [
            {"type": "http.request", "body": body, "more_body": False},
            {"type": "http.disconnect"},
        ]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "method": "POST",
            "path": CHAT,
            "raw_path": CHAT.encode(),
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }

        async def receive() -> Any:
            if len(events) == 1:  # once the engine has it
                while not engine.stats().running:
                    await anyio.sleep(0.01)
            return events.pop(0)

        async def send(message: Any) -> None:
            pass

        anyio.run(client.app, scope, receive, send)  # type: ignore[arg-type]
        assert engine.stats().running == 1  # it hasn't had its turn since
        engine.paused.set()
        assert engine.wait_until_idle(10)
        assert engine.steps == 0
        page = client.get("/metrics").text
        assert 'tierhints_requests_total{outcome="disconnected"} 1.0' in page


def test_metrics_count(client: TestClient) -> None:
    ask(client, max_tokens=2)
    refused(client, 404, model="other")
    page = client.get("/metrics").text
    for line in (
        'tierhints_requests_total{outcome="answered"} 1.0',
        'tierhints_requests_total{outcome="model_not_found"} 1.0',
        'tierhints_tokens_total{kind="completion"} 2.0',
        'tierhints_answers_total{kind="full",tier="full"} 1.0',
        "tierhints_engine_running 0.0",
        'tierhints_engine_tiers_total{name="full"} 1.0',
    ):
        assert line in page


def test_models_are_listed(client: TestClient) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == "tiny" and client.get("/v1/models/tiny").json() == model


def test_the_schema_names_every_route(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert {CHAT, TEXT, "/v1/models", "/v1/models/{name}", "/health", "/metrics"} <= set(paths)
