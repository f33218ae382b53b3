"""tierhints serve as a process: the official client asks it, strangers fuzz it, it drains, and what
a killed one left is used by none.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lib.commands import calibrate_requests, monitor
from scripts.experiments.serving import official_client
from tests.integration.test_collect_fisher import byte_tokenizer
from tests.integration.tiny_run import ROOT

CONTEXT = 512
LONG = "a memory of tiers " * 16
"""Long enough for compact pages."""
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}<assistant>"


def start(folder: Path, *flags: str) -> tuple["subprocess.Popen[bytes]", dict[str, Any]]:
    started = folder / "started.json"
    started.unlink(missing_ok=True)
    words = ["serve", "--model", str(folder), "--port", "0", "--kv-budget", "16MiB"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lib.commands", *words, "--json", str(started), *flags],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    while not started.exists():
        assert process.poll() is None, process.stderr and process.stderr.read().decode()
        time.sleep(0.05)
    return process, json.loads(started.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        vocab_size=258,
        max_position_embeddings=CONTEXT,
        initializer_range=0.1,
        eos_token_id=257,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def calibration(folder: Path) -> Path:
    """Of 60 requests, enough for a delta of 0.05."""
    requests = [{"prompt": f"{number} of " * 24, "max_tokens": 3} for number in range(100, 160)]
    (folder / "requests.jsonl").write_text("".join(json.dumps(each) + "\n" for each in requests))
    words = ["--model", str(folder), "--requests", str(folder / "requests.jsonl")]
    words += ["--output", str(folder / "calibration.json"), "--ladder", "K4V4 K8V8"]
    assert calibrate_requests.main([*words, "--kv-budget", "4MiB"]) == 0
    return folder / "calibration.json"


@pytest.fixture(scope="module")
def killed(folder: Path) -> tuple[Path, str]:
    """A folder where one that was killed in mid-request had originals, and what it had said."""
    spill = folder / "originals"
    process, document = start(folder, "--spill-dir", str(spill))
    client = openai.OpenAI(base_url=document["url"], api_key="none", max_retries=0)
    chunks = client.completions.create(
        model=document["model"],
        prompt=LONG,
        max_tokens=200,
        stream=True,
        extra_body={"quality_bound": {"metric": "exact"}},
    )
    said = next(iter(chunks)).choices[0].text
    files = [os.readlink(each) for each in Path(f"/proc/{process.pid}/fd").iterdir()]
    assert any(name.startswith(str(spill)) and "(deleted)" in name for name in files)
    process.kill()
    with pytest.raises((openai.APIConnectionError, httpx.TransportError)):
        said += "".join(chunk.choices[0].text for chunk in chunks)
    process.wait()
    return spill, said


@pytest.fixture(scope="module")
def served(folder: Path, calibration: Path, killed: tuple[Path, str]) -> Iterator[dict[str, Any]]:
    flags = ["--calibration", str(calibration), "--spill-dir", str(killed[0])]
    process, document = start(folder, "--name", "tiny", *flags)
    yield document
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


@pytest.fixture(scope="module")
def client(served: dict[str, Any]) -> openai.OpenAI:
    return openai.OpenAI(base_url=served["url"], api_key="none", max_retries=0)


class TestOfficialClient:
    def test_bounds_and_what_is_known_of_answers(self, client: openai.OpenAI) -> None:
        texts = {}
        for name, bound in (("full", None), ("exact", {"metric": "exact"}), ("kl", 5.0)):
            reply = client.completions.create(
                model="tiny",
                prompt=LONG,
                max_tokens=24,
                extra_body={} if bound is None else {"quality_bound": bound},
            )
            quality: dict[str, Any] = reply.quality  # type: ignore[attr-defined]
            texts[name] = reply.choices[0].text
            assert quality["kind"] == ("full" if bound is None else "verified")
            assert quality["bound"] <= (5.0 if name == "kl" else 0.0)
            assert quality["kv_bytes"] <= quality["total_bytes"]
            used: Any = reply.usage
            accepted = used.completion_tokens_details.accepted_prediction_tokens
            assert accepted == 0 if bound is None else 0 < accepted < used.completion_tokens
            # What the first had computed, the others need not.
            assert (used.prompt_tokens_details.cached_tokens > 0) == (len(texts) > 1)
        assert texts["exact"] == texts["full"]

    def test_a_calibrated_bound(self, client: openai.OpenAI) -> None:
        tiers = []
        for epsilon in (1e-12, 100.0):
            bound = {"epsilon": epsilon, "delta": 0.05}
            reply = client.completions.create(
                model="tiny", prompt=LONG, max_tokens=6, extra_body={"quality_bound": bound}
            )
            quality: dict[str, Any] = reply.quality  # type: ignore[attr-defined]
            assert (quality["kind"], quality["delta"]) == ("calibrated", 0.05)
            assert 0 <= quality["bound"] <= epsilon
            tiers.append(quality["tier"])
        assert tiers == ["full", "K4V4"]
        for delta, more, code in (
            (0.01, {}, "calibration_too_small"),
            (0.05, {"temperature": 0.5}, "calibration_of_greedy"),
        ):
            bound = {"epsilon": 0.1, "delta": delta}
            with pytest.raises(openai.BadRequestError) as refused:
                client.completions.create(
                    model="tiny", prompt=LONG, extra_body={"quality_bound": bound}, **more
                )
            assert (refused.value.code, refused.value.param) == (code, "quality_bound")

    def test_nothing_that_a_killed_one_left_is_used(
        self, client: openai.OpenAI, killed: tuple[Path, str]
    ) -> None:
        spill, said = killed
        assert said and not list(spill.iterdir())
        for bound in (None, {"metric": "exact"}):
            reply = client.completions.create(
                model="tiny", prompt=LONG, max_tokens=200, extra_body={"quality_bound": bound}
            )
            assert reply.choices[0].text.startswith(said)
        assert not list(spill.iterdir())

    def test_a_stream_is_what_the_whole_is(self, client: openai.OpenAI) -> None:
        how: dict[str, Any] = {
            "model": "tiny",
            "messages": [{"role": "user", "content": LONG}],
            "max_completion_tokens": 12,
            "seed": 3,
            "temperature": 1,
            "n": 2,
        }
        whole = client.chat.completions.create(**how)
        texts = ["", ""]
        last: Any = None
        for last in client.chat.completions.create(
            **how, stream=True, stream_options={"include_usage": True}
        ):
            for choice in last.choices:
                texts[choice.index] += choice.delta.content or ""
        assert texts == [choice.message.content for choice in whole.choices]
        assert last.usage.completion_tokens == whole.usage.completion_tokens  # type: ignore[union-attr]
        assert last.quality == whole.quality  # type: ignore[attr-defined]

    def test_the_script_that_asks_an_endpoint_finds_nothing_wrong(
        self, served: dict[str, Any]
    ) -> None:
        needs_words = ["stops", "tools", "tools_stream", "schemas"]  # of a trained model
        assert official_client.main(["--url", served["url"], "--without", *needs_words]) == 0

    def test_errors_are_the_clients_own(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.NotFoundError) as missing:
            client.completions.create(model="other", prompt="a")
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as long:
            client.completions.create(model="tiny", prompt="a" * (CONTEXT + 1))
        assert (long.value.code, long.value.param) == ("context_length_exceeded", "prompt")


def test_an_operator_lowers_the_budget_under_a_stream(folder: Path) -> None:
    control = folder / "kv.json"
    process, document = start(folder, "--control", str(control))
    client = openai.OpenAI(base_url=document["url"], api_key="none", max_retries=0)
    how: dict[str, Any] = {"model": document["model"], "prompt": LONG, "max_tokens": 200}
    bound = {"quality_bound": {"metric": "exact"}}
    whole = client.completions.create(**how).choices[0].text
    streams = [client.completions.create(**how, stream=True, extra_body=bound) for _ in range(3)]
    firsts = [next(iter(stream)).choices[0].text for stream in streams]
    assert monitor.main([str(control), "--budget", "1500KiB", "--once"]) == 0
    for first, stream in zip(firsts, streams, strict=True):
        assert first + "".join(chunk.choices[0].text for chunk in stream) == whole
    assert monitor.main([str(control), "--budget", "1KiB", "--once"]) == 1
    page = httpx.get(document["url"].replace("/v1", "/metrics")).text
    assert "tierhints_engine_kv_budget 1.536e+06" in page
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


def test_one_that_is_told_to_end_finishes_what_it_has(folder: Path) -> None:
    process, document = start(folder, "--api-key", "secret", "--drain-seconds", "60")
    client = openai.OpenAI(base_url=document["url"], api_key="secret", max_retries=0)
    name = document["model"]
    bound = {"epsilon": 0.05, "delta": 0.05}
    with pytest.raises(openai.BadRequestError) as uncalibrated:
        client.completions.create(model=name, prompt="a", extra_body={"quality_bound": bound})
    assert uncalibrated.value.code == "calibration_missing"
    stream = client.completions.create(model=name, prompt=LONG, max_tokens=200, stream=True)
    chunks = iter(stream)
    next(chunks)
    process.send_signal(signal.SIGTERM)
    refused: list[int] = []

    def ask_until_refused() -> None:
        while not refused:
            try:
                client.completions.create(model=name, prompt="a", max_tokens=1)
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
    assert process.wait(60) == 0


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("schemathesis") is None, reason="schemathesis is not installed"
)
def test_strangers_find_nothing(served: dict[str, Any]) -> None:
    url = served["url"].removesuffix("/v1")
    words = [f"{url}/openapi.json", "--max-examples", "30", "--exclude-path", "/metrics"]
    # The schema can't say which fields go together.
    words += ["--exclude-checks", "positive_data_acceptance"]
    done = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "run", *words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
