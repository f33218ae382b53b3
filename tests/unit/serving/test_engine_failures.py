"""The endpoint over the engine itself: a disk that fails costs no request but the page's own."""

import errno
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from transformers import LlamaConfig, LlamaForCausalLM

from lib.progressive.engine import Engine
from lib.progressive.kv.originals import Originals
from lib.serving.app import make_app
from lib.serving.settings import ModelCard, Settings

EXACT = {"metric": "exact"}
REQUESTS = [("a page that fails " * 14, EXACT), ("other pages " * 20, EXACT), ("none " * 50, None)]
"""Prompts, long enough for compact pages, and bounds."""


@pytest.fixture(scope="module")
def small() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        vocab_size=258,
        max_position_embeddings=512,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def real(small: Any) -> Iterator[Engine]:
    with Engine(small, kv_budget=2**24, ladder="K4V4", prefix_bytes=0) as engine:
        yield engine


@pytest.fixture
def client(real: Engine, tokenizer: Any) -> TestClient:
    card = ModelCard(name="tiny", vocab_size=258, stop_ids=frozenset())
    made = make_app(real, tokenizer, Settings(model=card))
    return TestClient(made, raise_server_exceptions=False)


def ask(client: TestClient, prompt: str, bound: Any, *, stream: bool = False) -> tuple[int, Any]:
    """Return the status, and the text or the error."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 12, "stream": stream}
    reply = client.post("/v1/completions", json={**body, "quality_bound": bound})
    if not stream:
        document = reply.json()
        return reply.status_code, document.get("error") or document["choices"][0]["text"]
    *events, end, _ = reply.text.split("\n\n")
    assert end == "data: [DONE]"
    documents = [json.loads(event.removeprefix("data: ")) for event in events]
    if "error" in documents[-1]:
        return reply.status_code, documents[-1]["error"]
    return reply.status_code, "".join(each["choices"][0]["text"] for each in documents)


def fail_for_the_first(what: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have reads or writes of the first originals fail."""
    real = getattr(Originals, what)
    seen: list[Originals] = []

    def failing(self: Originals, view: memoryview, offset: int) -> None:
        seen.append(self)
        if self is seen[0]:
            raise OSError(number, os.strerror(number))
        real(self, view, offset)

    monkeypatch.setattr(Originals, what, failing)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("what", "number", "said"),
    [
        ("_write", errno.ENOSPC, "of layer 0 can't be written (No space left on device)"),
        ("_read", errno.EIO, "of layer 0 can't be read (Input/output error)"),
    ],
)
def test_a_disk_that_fails_one_request_fails_no_other(
    client: TestClient,
    real: Engine,
    stream: bool,
    what: str,
    number: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = [ask(client, *each)[1] for each in REQUESTS]
    with monkeypatch.context() as context, ThreadPoolExecutor(3) as pool:
        fail_for_the_first(what, number, context)
        jobs = [pool.submit(ask, client, *each, stream=stream) for each in REQUESTS]
        answers = [job.result(60) for job in jobs]
    failed = [place for place, (_, text) in enumerate(answers) if isinstance(text, dict)]
    assert len(failed) == 1 and failed[0] < 2
    status, error = answers[failed[0]]
    assert status == (200 if stream else 500)
    assert said in error.pop("message")
    assert error == {"type": "server_error", "param": None, "code": "engine_failure"}
    for place, answer in enumerate(answers):
        assert place in failed or answer == (200, expected[place])
    assert ask(client, *REQUESTS[failed[0]]) == (200, expected[failed[0]])
    assert real.stats().kv_bytes == real.fixed_bytes


def test_without_a_file_more_what_needs_none_is_answered(
    small: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: Any, **more: Any) -> Any:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with Engine(small, kv_budget=2**24) as engine:  # which keeps what full requests begin with
        card = ModelCard(name="tiny", vocab_size=258, stop_ids=frozenset())
        client = TestClient(make_app(engine, tokenizer, Settings(model=card)))
        with monkeypatch.context() as context:
            context.setattr("lib.progressive.kv.originals._open_nameless", failing)
            status, error = ask(client, *REQUESTS[0])
            assert status == 500 and "(Too many open files)" in error["message"]
            status, text = ask(client, REQUESTS[0][0], None)
            assert status == 200
        assert ask(client, *REQUESTS[0]) == (200, text)
