"""OpenAI's own client at an endpoint that runs: does all that is supported come out as it expects?

    python scripts/experiments/serving/official_client.py --url http://127.0.0.1:8000/v1

Whichever version of ``openai`` is importable asks; a gateway's address may be given in the place of
the endpoint's. Each check is a line, with what was wrong; exit code 1 where any failed. What a
gateway drops (``--without quality``) is left out by name. stdout ends with

    {"client", "url", "model", "checks": {NAME: null or what was wrong}, "passed", "failed"}
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

import openai

from lib.commands.cli import Parser, add_json_flag, emit, run_main
from lib.errors import InputError

MESSAGES: list[Any] = [{"role": "user", "content": "Why is the sky blue? Answer in one sentence."}]
PROMPT = "The sky is blue because"
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["blue", "red"]}},
    "required": ["colour"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {"name": "paint", "description": "Paint the sky.", "parameters": SCHEMA},
    }
]
EPSILON = 0.05

Check = Callable[["Asking"], None]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    """Add a check under its function's name."""
    CHECKS[function.__name__] = function
    return function


class Asking:
    """A client, and the model that it asks for."""

    def __init__(self, client: openai.OpenAI, model: str) -> None:
        self.client, self.model = client, model

    def chat(self, **more: Any) -> Any:
        create: Any = self.client.chat.completions.create
        return create(**{"model": self.model, "messages": MESSAGES, **GREEDY, **more})

    def text(self, **more: Any) -> Any:
        create: Any = self.client.completions.create
        return create(**{"model": self.model, "prompt": PROMPT, **GREEDY, **more})


@check
def models(ask: Asking) -> None:
    assert ask.client.models.retrieve(ask.model).id == ask.model


@check
def chat(ask: Asking) -> None:
    reply = ask.chat()
    assert reply.object == "chat.completion"
    (choice,) = reply.choices
    assert choice.message.role == "assistant" and choice.finish_reason in ("stop", "length")
    usage = reply.usage
    assert 0 < usage.completion_tokens <= GREEDY["max_tokens"]
    assert usage.prompt_tokens + usage.completion_tokens == usage.total_tokens


@check
def chat_stream(ask: Asking) -> None:
    chunks = list(ask.chat(stream=True, stream_options={"include_usage": True}))
    said = "".join(each.choices[0].delta.content or "" for each in chunks if each.choices)
    assert said == ask.chat().choices[0].message.content
    (_,) = [each for each in chunks if each.choices and each.choices[0].finish_reason]
    (usage,) = [each.usage for each in chunks if each.usage is not None]
    assert usage.completion_tokens > 0


@check
def completions(ask: Asking) -> None:
    reply = ask.text()
    assert reply.object == "text_completion" and reply.choices[0].text


@check
def completions_stream(ask: Asking) -> None:
    chunks = ask.text(stream=True)  # of which a gateway may add some without text
    said = "".join(each.choices[0].text or "" for each in chunks if each.choices)
    assert said == ask.text().choices[0].text


@check
def seeds_and_n(ask: Asking) -> None:
    first, again = (ask.chat(n=2, seed=7, temperature=1) for _ in range(2))
    assert [each.index for each in first.choices] == [0, 1]
    texts = [[each.message.content for each in reply.choices] for reply in (first, again)]
    assert texts[0] == texts[1], "the same seed, and other texts"


@check
def stops(ask: Asking) -> None:
    whole = ask.text().choices[0].text
    stop = whole[len(whole) // 2 :][:4]
    choice = ask.text(stop=[stop]).choices[0]
    assert choice.text == whole[: whole.index(stop)] and choice.finish_reason == "stop"


@check
def logprobs(ask: Asking) -> None:
    tokens = ask.chat(logprobs=True, top_logprobs=3).choices[0].logprobs.content
    for token in tokens:
        values = [each.logprob for each in token.top_logprobs]
        assert len(values) == 3 and values == sorted(values, reverse=True)
        assert token.logprob == values[0] <= 0, "greedy is the most likely"


@check
def schemas(ask: Asking) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "sky", "schema": SCHEMA, "strict": True}}
    content = ask.chat(response_format=form, max_tokens=48).choices[0].message.content
    assert json.loads(content)["colour"] in ("blue", "red")


@check
def tools(ask: Asking) -> None:
    choice = ask.chat(tools=TOOLS, tool_choice="required", max_tokens=64).choices[0]
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and call.function.name == "paint"
    assert json.loads(call.function.arguments)["colour"] in ("blue", "red")


@check
def tools_stream(ask: Asking) -> None:
    name, arguments = "", ""
    for chunk in ask.chat(tools=TOOLS, tool_choice="required", max_tokens=64, stream=True):
        for call in (chunk.choices[0].delta.tool_calls or []) if chunk.choices else []:
            name += call.function.name or ""
            arguments += call.function.arguments or ""
    assert name == "paint" and json.loads(arguments)["colour"] in ("blue", "red")


@check
def bounds(ask: Asking) -> None:
    for bound, most in ((EPSILON, EPSILON), ({"metric": "exact"}, 0.0), (None, 0.0)):
        more = {} if bound is None else {"extra_body": {"quality_bound": bound}}
        reply = ask.chat(**more)
        quality: Any = reply.quality
        assert quality["bound"] <= most, quality
        assert quality["tier"] and quality["kv_bytes"] > 0, quality
        if bound != EPSILON:
            assert reply.choices[0].message.content == ask.chat().choices[0].message.content


@check
def quality_of_streams(ask: Asking) -> None:
    chunks = ask.chat(stream=True, extra_body={"quality_bound": EPSILON})
    found: list[Any] = [getattr(each, "quality", None) for each in chunks]
    (quality,) = [each for each in found if each is not None]
    assert quality["bound"] <= EPSILON


@check
def errors(ask: Asking) -> None:
    wrong: list[dict[str, Any]] = [
        {"model": "no-such-model"},
        {"temperature": -1},
        {"extra_body": {"quality_bound": -0.1}},
        {"extra_body": {"quality_bound": "close"}},
        {"messages": [{"role": "user", "content": "sky " * 200_000}]},
    ]
    for more in wrong:
        try:
            ask.chat(**more)
        except (openai.NotFoundError, openai.BadRequestError):  # a gateway has 400 for a model
            continue
        raise AssertionError(f"{more!s:.60} was answered")


@check
def a_stream_that_is_left(ask: Asking) -> None:
    stream = ask.chat(stream=True, max_tokens=200)
    next(iter(stream))
    stream.close()
    assert ask.chat().choices, "the next one is answered"


def ask_all(ask: Asking, without: Sequence[str]) -> dict[str, str | None]:
    """Return what was wrong by check, None where nothing was."""
    found: dict[str, str | None] = {}
    for name, function in CHECKS.items():
        if name in without:
            continue
        try:
            function(ask)
            found[name] = None
        except Exception as error:
            said = str(error).partition("\n")[0]
            found[name] = f"{type(error).__name__}: {said}"
        print(f"{name:24} {found[name] or 'pass'}", file=sys.stderr, flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    key = os.environ.get("TIERHINTS_API_KEY", "none")
    client = openai.OpenAI(base_url=args.url, api_key=key, max_retries=0, timeout=600)
    try:
        model = args.model or client.models.list().data[0].id
    except (openai.OpenAIError, IndexError) as error:
        raise InputError(f"--url {args.url} has no endpoint ({error}): start one") from error
    found = ask_all(Asking(client, model), args.without)
    failed = sum(wrong is not None for wrong in found.values())
    document = {
        "client": openai.__version__,
        "url": args.url,
        "model": model,
        "checks": found,
        "passed": len(found) - failed,
        "failed": failed,
    }
    table = f"openai {openai.__version__}: {len(found) - failed} of {len(found)} checks pass"
    emit(table, document, args.json)
    return int(failed > 0)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(str(__doc__))
    parser.add_argument(
        "--url", default="http://127.0.0.1:8000/v1", help="of the endpoint (default: %(default)s)"
    )
    parser.add_argument("--model", metavar="NAME", help="(default: the first of those listed)")
    parser.add_argument(
        "--without", nargs="*", default=(), choices=sorted(CHECKS), help="checks to leave out"
    )
    add_json_flag(parser)
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
