"""Many clients at an endpoint that runs: is every answer whole, and is the memory given back?

    python scripts/experiments/serving/load.py --url http://127.0.0.1:8000/v1 --clients 200

Each client streams one completion after another, of varying length and bound, until the time is
over; a share of the streams is left in the middle. Of the others each must end with a
finish_reason, its quality and [DONE], with a bound within what was asked for. 429 is an answer: the
client comes back. At the end the engine must hold no request, and no more memory for them than
before.
"""

import argparse
import asyncio
import json
import os
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

import httpx

from lib.commands.cli import Parser, add_json_flag, emit, run_main
from lib.commands.flags import whole_number
from lib.errors import InputError

BOUNDS: tuple[Any, ...] = (None, 0.05, 0.2, {"metric": "exact"})
WORDS = "the tiers of a memory hold what is asked for most often and give back what is not".split()
SETTLE_SECONDS = 30.0
LEFT_AFTER_TOKENS = 3


class Client:
    """Asks, streams, and counts what became of it."""

    def __init__(
        self, http: httpx.AsyncClient, model: str, counts: Counter[str], *, words: int, seed: int
    ) -> None:
        self._http = http
        self._model = model
        self._words = words
        self._counts = counts
        self._random = random.Random(seed)
        self.first_token_seconds: list[float] = []

    async def run(self, until: float, share_left: float) -> None:
        """Ask until the time is over."""
        while time.monotonic() < until:
            bound = self._random.choice(BOUNDS)
            leaves = self._random.random() < share_left
            body = {
                "model": self._model,
                "prompt": self._prompt(),
                "max_tokens": self._random.randint(4, 24),
                "stream": True,
                "seed": self._random.randrange(2**31),
                "temperature": self._random.choice([0, 1]),
                **({} if bound is None else {"quality_bound": bound}),
            }
            try:
                outcome = await self._ask(body, bound, leaves=leaves)
            except httpx.HTTPError as error:
                outcome = f"lost: {type(error).__name__}"
            self._counts[outcome] += 1
            if outcome == "queue_full":
                await asyncio.sleep(self._random.uniform(0.5, 2))

    def _prompt(self) -> str:
        return " ".join(self._random.choices(WORDS, k=self._random.randint(4, self._words)))

    async def _ask(self, body: dict[str, Any], bound: Any, *, leaves: bool) -> str:
        start = time.monotonic()
        pieces, finish, quality, done = 0, None, None, False
        async with self._http.stream("POST", "completions", json=body) as reply:
            if reply.status_code != 200:
                await reply.aread()
                return str(reply.json()["error"]["code"])
            async for line in reply.aiter_lines():
                if line == "data: [DONE]":
                    done = True
                elif line:
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        return f"lost: {event['error']['message']}"
                    (choice,) = event["choices"]
                    finish = choice["finish_reason"] or finish
                    quality = event.get("quality", quality)
                    if choice["text"] and not pieces:
                        self.first_token_seconds.append(time.monotonic() - start)
                    pieces += bool(choice["text"])
                if leaves and pieces >= LEFT_AFTER_TOKENS:
                    return "left"
        if not done or finish is None or quality is None:
            return "lost: the stream was cut off"
        allowed = bound if isinstance(bound, float) else 0.0
        return "answered" if quality["bound"] <= allowed else "above its bound"


async def load(args: argparse.Namespace) -> dict[str, Any]:
    """Run the clients; returns what became of their requests, and the memory before and after."""
    key = os.environ.get("TIERHINTS_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=args.clients)
    async with httpx.AsyncClient(
        base_url=args.url.rstrip("/") + "/", headers=headers, limits=limits, timeout=args.timeout
    ) as http:
        try:
            model = (await http.get("models")).json()["data"][0]["id"]
        except (httpx.HTTPError, KeyError, ValueError) as error:
            raise InputError(f"--url {args.url} has no endpoint ({error}): start one") from error
        body = {"model": model, "prompt": "once", "max_tokens": 1}
        (await http.post("completions", json=body)).raise_for_status()  # it has begun to work
        before = await settled(http, args.url)
        counts: Counter[str] = Counter()
        clients = [
            Client(http, model, counts, words=args.words, seed=args.seed + each)
            for each in range(args.clients)
        ]
        start = time.monotonic()
        until = start + args.seconds
        await asyncio.gather(*(client.run(until, args.leaving) for client in clients))
        seconds = time.monotonic() - start
        after = await settled(http, args.url)
    first = sorted(each for client in clients for each in client.first_token_seconds)
    return {
        "clients": args.clients,
        "seconds": seconds,
        "outcomes": dict(sorted(counts.items())),
        "lost": sum(number for name, number in counts.items() if name.startswith("lost")),
        "above_bound": counts["above its bound"],
        "new_tokens": after["new_tokens"] - before["new_tokens"],
        "tokens_per_second": (after["new_tokens"] - before["new_tokens"]) / seconds,
        "first_token_seconds": {
            "median": first[len(first) // 2] if first else None,
            "p95": first[int(0.95 * len(first))] if first else None,
        },
        "before": before,
        "after": after,
    }


async def settled(http: httpx.AsyncClient, url: str) -> dict[str, float]:
    """Return the engine's figures once nothing runs, or the last ones."""
    until = time.monotonic() + SETTLE_SECONDS
    while True:
        found = await figures(http, url)
        if not found["running"] + found["waiting"] or time.monotonic() > until:
            return found
        await asyncio.sleep(0.2)


async def figures(http: httpx.AsyncClient, url: str) -> dict[str, float]:
    """Return what /metrics says of the engine and its process."""
    page = (await http.get(url.rstrip("/").removesuffix("/v1") + "/metrics")).text
    found = re.findall(r"^tierhints_engine_(\w+?)(?:_total)? ([\d.e+]+)$", page, re.MULTILINE)
    return {name: float(value) for name, value in found}


def load_table(document: dict[str, Any]) -> str:
    """Return what came of it."""
    before, after = document["before"], document["after"]
    lines = [
        f"{document['clients']} clients, {document['seconds']:.0f} s, "
        f"{document['tokens_per_second']:.1f} tokens/s",
        *(f"  {number:6} {name}" for name, number in document["outcomes"].items()),
        f"running at the end: {after['running']:.0f}, waiting: {after['waiting']:.0f}",
        f"bytes of keys and values: {before['kv_bytes']:.0f} before, {after['kv_bytes']:.0f} after",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    document = asyncio.run(load(args))
    emit(load_table(document), document, args.json)
    before, after = document["before"], document["after"]
    kept = after["running"] + after["waiting"] or after["kv_bytes"] > before["kv_bytes"]
    return 1 if document["lost"] or document["above_bound"] or kept else 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(str(__doc__))
    default = "(default: %(default)s)"
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help=default)
    parser.add_argument("--clients", type=whole_number(1), default=200, help=default)
    parser.add_argument("--seconds", type=whole_number(1), default=120, help=default)
    parser.add_argument(
        "--leaving", type=float, default=0.1, help=f"share of streams that are left {default}"
    )
    parser.add_argument(
        "--timeout", type=whole_number(1), default=600, help=f"seconds of a request {default}"
    )
    parser.add_argument(
        "--words", type=whole_number(4), default=120, help=f"of a prompt, at most {default}"
    )
    parser.add_argument("--seed", type=whole_number(0), default=0, help=default)
    add_json_flag(parser)
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
