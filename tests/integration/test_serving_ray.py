"""tierhints serve --ray with two replicas on this machine: the same answers, beginnings kept where
they are, and what happens where a replica, a client or the whole goes.
"""

import importlib.util
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.integration.test_serving import LONG, folder, start

__all__ = ["folder"]  # a fixture
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
    pytest.mark.skipif(not Path("/proc/self").exists(), reason="replicas are found in /proc"),
]
KEY = "secret"
WAIT_SECONDS = 120
BOUNDS: dict[str, Any] = {"full": None, "exact": {"metric": "exact"}, "kl": 5.0}


class Served:
    """A running endpoint, and its official client."""

    def __init__(self, process: "subprocess.Popen[bytes]", document: dict[str, Any]) -> None:
        self.process = process
        self.document = document
        self.url = document["url"]
        self.client = openai.OpenAI(base_url=self.url, api_key=KEY, max_retries=0, timeout=120)

    def complete(self, prompt: str, **how: Any) -> Any:
        how = {"max_tokens": 4, **how}
        return self.client.completions.create(model="tiny", prompt=prompt, **how)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url.removesuffix("/v1") + path, timeout=30)

    def figures(self, sample: str, **labels: str) -> dict[str, float]:
        """Return a figure of each replica."""
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(self.get("/metrics").text):
            for each in family.samples:
                if each.name == sample and labels.items() <= each.labels.items():
                    found[each.labels.get("replica", "")] = each.value
        return found

    def replica_processes(self) -> list[int]:
        """Return the processes of the replicas: of this endpoint's, since others may run."""
        parents, names = {}, {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    stat = (entry / "stat").read_text()
                    names[int(entry.name)] = (entry / "cmdline").read_bytes().decode()
                except OSError:
                    continue
                parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
        mine = []
        for number in parents:
            above = number
            while above in parents and above != self.process.pid:
                above = parents[above]
            if above == self.process.pid and "tierhints:Replica" in names[number]:
                mine.append(number)
        return mine


def until(holds: Callable[[], bool]) -> None:
    by = time.monotonic() + WAIT_SECONDS
    while not holds():
        assert time.monotonic() < by
        time.sleep(0.2)


@pytest.fixture(scope="module")
def on_ray(folder: Path) -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "local")  # whoever runs the tests may have a cluster
        flags = ["--name", "tiny", "--api-key", KEY, "--max-body", "8KiB", "--drain-seconds", "60"]
        served = Served(*start(folder, *flags, "--ray", "--replicas", "2"))
    yield served
    if served.process.poll() is None:
        served.process.kill()
    served.process.wait()


@pytest.fixture(scope="module")
def alone(folder: Path, on_ray: Served) -> Iterator[Served]:
    (folder / "started.json").unlink()
    served = Served(*start(folder, "--name", "tiny", "--api-key", KEY))
    yield served
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(60) == 0


def test_it_says_what_one_process_says_and_how_many_there_are(
    on_ray: Served, alone: Served
) -> None:
    assert on_ray.document.pop("replicas") == 2
    assert on_ray.document == {**alone.document, "url": on_ray.url}
    assert on_ray.get("/health").json() == {"status": "ok", "replicas": 2}
    assert on_ray.get("/openapi.json").json() == alone.get("/openapi.json").json()


@pytest.mark.parametrize("name", BOUNDS)
def test_answers_are_those_of_one_process(on_ray: Served, alone: Served, name: str) -> None:
    bound = BOUNDS[name]
    how = {} if bound is None else {"extra_body": {"quality_bound": bound}}
    for prompt in (f"{name} 1 {LONG}", f"{name} 2 {LONG}"):
        ours, theirs = (
            served.complete(prompt, max_tokens=24, **how).model_dump() for served in (on_ray, alone)
        )
        for reply in (ours, theirs):
            del reply["id"], reply["created"]
        assert ours == theirs
    assert ours["quality"]["kind"] == ("full" if bound is None else "verified")


def test_so_are_streams(on_ray: Served, alone: Served) -> None:
    how: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": f"stream {LONG}"}],
        "max_completion_tokens": 12,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    said = []
    for served in (on_ray, alone):
        chunks = [chunk.model_dump() for chunk in served.client.chat.completions.create(**how)]
        for chunk in chunks:
            del chunk["id"], chunk["created"]
        said.append(chunks)
    assert said[0] == said[1] and len(said[0]) > 3
    assert said[0][-1]["quality"]["tier"] == "full"


def test_texts_that_begin_alike_are_kept_with_the_replica_that_began(on_ray: Served) -> None:
    before = on_ray.figures("tierhints_tokens_total", kind="prompt")
    cached = [
        on_ray.complete(f"a beginning {LONG}{end}").usage.prompt_tokens_details.cached_tokens
        for end in ("one", "two", "three", "four", "five", "six")
    ]
    assert cached[0] == 0 and min(cached[1:]) > 128
    after = on_ray.figures("tierhints_tokens_total", kind="prompt")
    assert sorted(after[name] > before.get(name, 0) for name in after) == [False, True]


def test_others_are_spread(on_ray: Served) -> None:
    before = on_ray.figures("tierhints_tokens_total", kind="prompt")
    for number in range(6):
        on_ray.complete(f"{number} other " * 20)
    after = on_ray.figures("tierhints_tokens_total", kind="prompt")
    assert len(after) == 2
    assert all(after[name] > before.get(name, 0) for name in after)


def test_who_may_ask_and_how_much_is_checked_at_the_door(on_ray: Served) -> None:
    stranger = openai.OpenAI(base_url=on_ray.url, api_key="other", max_retries=0)
    with pytest.raises(openai.AuthenticationError) as unknown:
        stranger.models.list()
    assert unknown.value.code == "invalid_api_key"
    with pytest.raises(openai.APIStatusError) as large:
        on_ray.complete("a" * 9000)
    assert (large.value.status_code, large.value.code) == (413, "body_too_large")
    with pytest.raises(openai.NotFoundError):
        on_ray.client.models.retrieve("other")
    with pytest.raises(openai.BadRequestError) as long:
        on_ray.complete("a" * 600)
    assert long.value.code == "context_length_exceeded"
    assert on_ray.get("/nowhere").json()["error"]["type"] == "not_found_error"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_ends_its_request(on_ray: Served, stream: bool) -> None:
    body = {"model": "tiny", "prompt": f"gone {stream} " * 12, "max_tokens": 300, "stream": stream}
    outcome = {"outcome": "disconnected"}
    gone = sum(on_ray.figures("tierhints_requests_total", **outcome).values())
    headers = {"Authorization": f"Bearer {KEY}"}
    with (
        pytest.raises(httpx.ReadTimeout),
        httpx.stream(
            "POST", f"{on_ray.url}/completions", json=body, headers=headers, timeout=0.2
        ) as reply,
    ):
        for _ in reply.iter_lines():
            raise httpx.ReadTimeout("has enough")
    until(
        lambda: (
            sum(on_ray.figures("tierhints_requests_total", **outcome).values()) == gone + 1
            and not any(on_ray.figures("tierhints_engine_running").values())
        )
    )


def test_where_a_replica_dies_the_others_answer_and_it_is_replaced(on_ray: Served) -> None:
    streams = [
        iter(on_ray.complete(f"{number} text " * 20, max_tokens=300, stream=True))
        for number in range(2)
    ]
    said = [[next(stream)] for stream in streams]
    names = set(on_ray.figures("tierhints_engine_running"))
    os.kill(on_ray.replica_processes()[0], signal.SIGKILL)
    for number in range(6):
        assert on_ray.complete(f"{number} hello " * 12).choices[0].finish_reason == "length"
    ends = []
    for stream, chunks in zip(streams, said, strict=True):
        try:
            chunks.extend(stream)
            ends.append(chunks[-1].choices[0].finish_reason)
        except openai.APIError as error:
            ends.append(json.loads(json.dumps(error.body))["code"])
    assert sorted(ends) == ["length", "replica_failed"]
    until(lambda: on_ray.get("/health").json() == {"status": "ok", "replicas": 2})
    assert len(set(on_ray.figures("tierhints_engine_running")) - names) == 1


def test_one_that_is_told_to_end_finishes_what_it_has(on_ray: Served) -> None:
    """The last: the endpoint has ended after it."""
    chunks = iter(on_ray.complete(LONG, max_tokens=200, stream=True))
    next(chunks)
    on_ray.process.send_signal(signal.SIGTERM)
    refused: list[int] = []

    def ask_until_refused() -> None:
        while not refused:
            try:
                on_ray.complete("a", max_tokens=1)
            except openai.APIStatusError as error:
                refused.append(error.status_code)
            except openai.APIConnectionError:  # it has ended
                refused.append(0)

    asking = threading.Thread(target=ask_until_refused)
    asking.start()
    *_, last = chunks
    assert last.choices[0].finish_reason in ("length", "stop")
    asking.join()
    assert refused == [503]
    assert on_ray.process.wait(WAIT_SECONDS) == 0
    assert not on_ray.replica_processes()
